// An echo server and its client by Java NIO: channels are registered with their selector before they connect, as the common
// frameworks do it.
//
//     java Runtime.java serve PORT
//     java Runtime.java call HOST PORT CONNECTIONS SIZE

import java.io.IOException;
import java.net.InetSocketAddress;
import java.nio.ByteBuffer;
import java.nio.channels.SelectionKey;
import java.nio.channels.Selector;
import java.nio.channels.ServerSocketChannel;
import java.nio.channels.SocketChannel;
import java.util.Arrays;
import java.util.Random;

public class Runtime {
    public static void main(String[] words) throws IOException {
        if (words[0].equals("serve")) {
            serve(Integer.parseInt(words[1]));
        } else {
            var target = new InetSocketAddress(words[1], Integer.parseInt(words[2]));
            call(target, Integer.parseInt(words[3]), Integer.parseInt(words[4]));
        }
    }

    static void serve(int port) throws IOException {
        try (var selector = Selector.open(); var listener = ServerSocketChannel.open()) {
            listener.configureBlocking(false);
            listener.bind(new InetSocketAddress(port));
            listener.register(selector, SelectionKey.OP_ACCEPT);
            while (true) {
                selector.select();
                for (var keys = selector.selectedKeys().iterator(); keys.hasNext(); ) {
                    var key = keys.next();
                    keys.remove();
                    if (key.isAcceptable()) {
                        var channel = listener.accept();
                        if (channel == null) {
                            continue;
                        }
                        System.out.println("peer " + channel.getRemoteAddress());
                        channel.configureBlocking(false);
                        channel.register(selector, SelectionKey.OP_READ, ByteBuffer.allocateDirect(32_768));
                    } else {
                        echo(key);
                    }
                }
            }
        }
    }

    /** The buffer is either being filled (OP_READ) or being emptied (OP_WRITE). */
    static void echo(SelectionKey key) throws IOException {
        var channel = (SocketChannel) key.channel();
        var buffer = (ByteBuffer) key.attachment();
        if (key.isReadable()) {
            if (channel.read(buffer) < 0) {
                channel.close();
                return;
            }
            buffer.flip();
        }
        channel.write(buffer);
        if (buffer.hasRemaining()) {
            key.interestOps(SelectionKey.OP_WRITE);
        } else {
            buffer.clear();
            key.interestOps(SelectionKey.OP_READ);
        }
    }

    static class Exchange {
        final ByteBuffer sent;
        final ByteBuffer got;

        Exchange(int seed, int size) {
            var bytes = new byte[size];
            new Random(seed).nextBytes(bytes);
            sent = ByteBuffer.wrap(bytes);
            got = ByteBuffer.allocate(size + 1);
        }
    }

    static void call(InetSocketAddress target, int connections, int size) throws IOException {
        try (var selector = Selector.open()) {
            for (int index = 0; index < connections; index++) {
                var channel = SocketChannel.open();
                channel.configureBlocking(false);
                var key = channel.register(selector, SelectionKey.OP_CONNECT, new Exchange(index, size));
                if (channel.connect(target)) {
                    // Possible for a channel that does not block: finishConnect is not to be waited for.
                    connected(key);
                }
            }
            int left = connections;
            while (left > 0) {
                selector.select();
                for (var keys = selector.selectedKeys().iterator(); keys.hasNext(); ) {
                    var key = keys.next();
                    keys.remove();
                    if (key.isConnectable()) {
                        ((SocketChannel) key.channel()).finishConnect();
                        connected(key);
                    } else if (move(key)) {
                        left--;
                    }
                }
            }
        }
        System.out.println("exact: " + connections + " connections");
    }

    static void connected(SelectionKey key) throws IOException {
        System.out.println("local " + ((SocketChannel) key.channel()).getLocalAddress());
        key.interestOps(SelectionKey.OP_READ | SelectionKey.OP_WRITE);
    }

    /** Whether the exchange has come to its end, and the right one. */
    static boolean move(SelectionKey key) throws IOException {
        var channel = (SocketChannel) key.channel();
        var exchange = (Exchange) key.attachment();
        if (key.isWritable()) {
            channel.write(exchange.sent);
            if (!exchange.sent.hasRemaining()) {
                channel.shutdownOutput();
                key.interestOps(SelectionKey.OP_READ);
            }
        }
        if (!key.isReadable() || channel.read(exchange.got) >= 0) {
            return false;
        }
        var got = Arrays.copyOf(exchange.got.array(), exchange.got.position());
        if (!Arrays.equals(got, exchange.sent.array())) {
            throw new IOException(got.length + " bytes came back, or others");
        }
        channel.close();
        return true;
    }
}
