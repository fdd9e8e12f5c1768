'use strict';
// How a channel ends: the other end of test_bun_deno.py.
// As a child:  lives.js disconnects|exits|waits
// As a parent: lives.js disconnects|waits PROGRAM ARGS...   prints what happened, as JSON.
const child_process = require('child_process');

const [what, ...argv] = process.argv.slice(2);

if (argv.length) {
  const child = child_process.spawn(argv[0], argv.slice(1), { stdio: [0, 1, 2, 'ipc'] });
  const messages = [];
  const ended = {};
  // In either order: Bun and Deno may see the exit first.
  const end = (event, ...args) => {
    ended[event] = args;
    if (ended.disconnect && ended.exit)
      console.log(JSON.stringify([messages, ended.disconnect, ended.exit]));
  };
  child.on('message', (message) => {
    messages.push(message);
    if (what === 'disconnects') child.disconnect();
  });
  child.on('disconnect', () => end('disconnect', child.connected));
  child.on('exit', (code, signal) => end('exit', code, signal));
} else {
  process.on('disconnect', () => { if (what === 'waits') process.exit(4); });
  process.on('message', () => {});
  process.send('last', () => {
    if (what === 'disconnects') process.disconnect();
    if (what === 'exits') process.exit(3);
  });
}
