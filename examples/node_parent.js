// A Node.js parent that hands its connections to a Python child: `node node_parent.js`, with
// child.py of the README beside it, then `curl --http0.9 127.0.0.1:1337`.
const { spawn } = require('child_process');
const net = require('net');

const python = process.env.PYTHON || 'python3';
const child = spawn(python, ['child.py'], { stdio: [0, 1, 2, 'ipc'] });
child.on('exit', (code) => process.exit(code ?? 1)); // or clients would wait for nobody
// pauseOnConnect: what Node reads before the child has the socket, the child never sees.
const server = net.createServer({ pauseOnConnect: true }, (socket) => {
  child.send('socket', socket, (error) => {
    if (error) socket.destroy();
  });
});
server.listen(Number(process.env.PORT || 1337), '127.0.0.1', () => {
  console.log(`listening at 127.0.0.1:${server.address().port}`);
});
