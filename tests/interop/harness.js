'use strict';
// What the Node ends share.
const child_process = require('child_process');

const inboxes = new WeakMap();

// Resolves to [message, handle] of the next message. From the first call on one listener takes all
// of them: a listener that comes and goes is not promised to see them in order.
exports.nextMessage = (channel) => {
  if (!inboxes.has(channel)) {
    const inbox = { messages: [], readers: [] };
    inboxes.set(channel, inbox);
    channel.on('message', (...received) => {
      if (inbox.readers.length) inbox.readers.shift()(received);
      else inbox.messages.push(received);
    });
  }
  const { messages, readers } = inboxes.get(channel);
  return new Promise((resolve) => {
    if (messages.length) resolve(messages.shift());
    else readers.push(resolve);
  });
};

exports.once = (emitter, event) => new Promise((resolve, reject) => {
  emitter.once('error', reject);
  emitter.once(event, (...args) => resolve(args));
});

// Deno 2.9 keeps its copy of what it sent for ever if the acknowledgement comes before it has noticed
// that its own write is done; and it does not notice the end of a channel that is closed with words
// of its own unread. Either would keep the process: see docs/peers.md.
exports.mustBeEnded = 'Deno' in globalThis;

// Runs role(channel). As a parent of argv: disconnects afterwards and exits with the child's code.
// As a child: ends when the parent disconnects.
exports.run = async (role, argv) => {
  if (!argv.length) {
    await role(process);
    if (exports.mustBeEnded) process.exit();
    return;
  }
  const child = child_process.spawn(argv[0], argv.slice(1), { stdio: [0, 1, 2, 'ipc'] });
  let over = false;
  child.once('disconnect', () => {
    if (over) return;
    console.error('the child ended early');
    process.exit(98);
  });
  child.once('exit', (code, signal) => {
    process.exitCode = signal ? 99 : code;
    if (exports.mustBeEnded) process.exit();
  });
  await role(child);
  over = true;
  child.disconnect();
};
