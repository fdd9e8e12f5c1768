'use strict';
// What the Node ends share.
const child_process = require('child_process');

// Resolves to [message, handle] of the next message.
exports.nextMessage = (channel) => new Promise((resolve) =>
  channel.once('message', (message, handle) => resolve([message, handle])));

exports.once = (emitter, event) => new Promise((resolve, reject) => {
  emitter.once('error', reject);
  emitter.once(event, (...args) => resolve(args));
});

// Runs role(channel). As a parent of argv: disconnects afterwards and exits with the child's code.
// As a child: ends when the parent disconnects.
exports.run = async (role, argv) => {
  if (!argv.length) return role(process);
  const child = child_process.spawn(argv[0], argv.slice(1), { stdio: [0, 1, 2, 'ipc'] });
  let over = false;
  child.once('disconnect', () => {
    if (over) return;
    console.error('the child ended early');
    process.exit(98);
  });
  child.once('exit', (code, signal) => { process.exitCode = signal ? 99 : code; });
  await role(child);
  over = true;
  child.disconnect();
};
