'use strict';
// The Node end of test_volume.py; see volume.py.   volume.js give|take|echo COUNT|SIZE [PROGRAM ARGS...]
const assert = require('assert');
const net = require('net');
const { nextMessage, once, run } = require('./harness.js');

const [what, number, ...argv] = process.argv.slice(2);
const WAVE = 250;

// Listens, and calls onConnection with each accepted socket, unread.
async function listen(onConnection) {
  const server = net.createServer({ pauseOnConnect: true }, onConnection);
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return server;
}

// A client that must be greeted with its own port.
async function client(server) {
  const socket = net.connect(server.address());
  await once(socket, 'connect');
  const { localPort } = socket;
  let data = '';
  socket.on('data', (chunk) => { data += chunk; });
  await once(socket, 'end');
  assert.strictEqual(data, `served ${localPort}`);
}

const roles = {
  async give(channel) {
    const server = await listen((socket) => channel.send({ port: socket.remotePort }, socket));
    for (let served = 0; served < Number(number); served += WAVE) {
      await Promise.all(Array.from({ length: WAVE }, () => client(server)));
    }
    server.close();
    const taken = nextMessage(channel);
    channel.send('done');
    assert.deepStrictEqual(await taken, [Number(number), undefined]);
  },

  async take(channel) {
    let taken = 0;
    await new Promise((resolve) => channel.on('message', function receive(message, socket) {
      if (message === 'done') {
        channel.off('message', receive);
        channel.send(taken);
        return resolve();
      }
      taken++;
      assert.strictEqual(socket.remotePort, message.port);
      socket.end(`served ${message.port}`);
    }));
  },

  async giveLarge(channel) {
    const pad = 'x'.repeat(Number(number));
    const server = await listen((socket) => channel.send({ port: socket.remotePort, pad }, socket));
    const served = client(server);
    const [message, socket] = await nextMessage(channel);
    assert.strictEqual(message.pad, pad);
    assert.strictEqual(socket.remotePort, message.port);
    socket.end(`served ${message.port}`);
    await served;
    server.close();
    channel.send('done');
  },

  async takeLarge(channel) {
    const [message, socket] = await nextMessage(channel);
    assert.strictEqual(message.pad.length, Number(number));
    channel.send(message, socket);
    assert.deepStrictEqual(await nextMessage(channel), ['done', undefined]);
  },
};

run(roles[what], argv);
