// Node.js as its users run it: `node node.js handles|messages N`.
const { fork } = require('child_process');
const net = require('net');

if (process.send) {
  let count = 0;
  process.on('message', (message, handle) => {
    if (handle) handle.destroy();
    if (message === 'warm') process.send('warm');
    else if (++count === message.of) process.send('done');
  });
} else {
  const [what, n] = [process.argv[2], Number(process.argv[3])];
  const child = fork(__filename);
  const server = net.createServer((socket) => {
    let sent = 0;
    let start;
    const more = () => {
      // As its documentation says: while send() returns true, then when the last has been written.
      while (sent < n) {
        const message = { op: 'route', n: sent++, of: n, ok: true };
        const last = sent % 64 === 0 || sent === n;
        if (what === 'handles') child.send(message, socket, { keepOpen: true }, last ? next : undefined);
        else child.send(message, last ? next : undefined);
        if (last) return;
      }
    };
    const next = () => more();
    child.on('message', (message) => {
      if (message === 'warm') {
        start = process.hrtime.bigint();
        more();
      } else {
        const seconds = Number(process.hrtime.bigint() - start) / 1e9;
        console.log(JSON.stringify({ seconds, count: n }));
        process.exit(0);
      }
    });
    child.send('warm');
  });
  server.listen(0, '127.0.0.1', () => net.connect(server.address().port, '127.0.0.1'));
}
