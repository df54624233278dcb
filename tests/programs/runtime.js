// An echo server and its client by Node's own library (libuv: level-triggered epoll, accept4 without an address).
//
//     node runtime.js serve PORT
//     node runtime.js call HOST PORT CONNECTIONS SIZE
"use strict";
const { createHash, randomBytes } = require("node:crypto");
const net = require("node:net");

const [what, ...rest] = process.argv.slice(2);
if (what === "serve") serve(Number(rest[0]));
else call(rest[0], ...rest.slice(1).map(Number));

function serve(port) {
  const server = net.createServer({ allowHalfOpen: true }, (socket) => {
    console.log("peer", socket.remoteAddress, socket.remotePort);
    socket.on("error", (error) => console.log("WRONG:", error.message));
    socket.pipe(socket);
  });
  server.listen(port, "::");
}

async function call(host, port, connections, size) {
  try {
    await Promise.all(Array.from({ length: connections }, () => exchange(host, port, size)));
    console.log("exact:", connections, "connections");
  } catch (error) {
    console.log("WRONG:", error.message);
    process.exitCode = 1;
  }
}

function exchange(host, port, size) {
  return new Promise((done, failed) => {
    const sent = randomBytes(size);
    const got = createHash("sha256");
    const socket = net.connect({ host, port, allowHalfOpen: true });
    socket.on("connect", () => {
      console.log("local", socket.localAddress, socket.localPort);
      socket.end(sent);
    });
    socket.on("data", (data) => got.update(data));
    socket.on("error", failed);
    socket.on("end", () => {
      const same = got.digest("hex") === createHash("sha256").update(sent).digest("hex");
      if (same) done();
      else failed(new Error("other bytes came back"));
    });
  });
}
