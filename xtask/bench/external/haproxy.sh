#!/bin/sh
# HAProxy as a proxy of each pod: cargo xtask bench --external "haproxy=sh xtask/bench/external/haproxy.sh"
#
# An example of what the benchmark's --external expects: whose proxy this is comes in MARLINE_*, redirecting is done here, and the file
# MARLINE_READY is made at the end. mTLS by the roots alone: this HAProxy (Debian 12's) does not check SPIFFE IDs.
# It needs haproxy and nftables.
set -eu

user=1337
inbound=15006
outbound=15001
cd "$MARLINE_DIRECTORY"
# HAProxy wants the certificate and its key in one file.
(umask 077 && cat "$MARLINE_CERT_CHAIN" "$MARLINE_KEY" >own.pem)

if [ "$MARLINE_ROLE" = client ]; then
    bind="bind 127.0.0.1:$outbound"
    server="server peer $MARLINE_PEER_ADDRESS:$MARLINE_PORT ssl crt $PWD/own.pem ca-file $MARLINE_ROOTS verify required"
    rule="chain outbound {
        type nat hook output priority -100
        ip daddr $MARLINE_PEER_ADDRESS tcp dport $MARLINE_PORT meta skuid != $user redirect to :$outbound
    }"
else
    bind="bind $MARLINE_POD_ADDRESS:$inbound ssl crt $PWD/own.pem ca-file $MARLINE_ROOTS verify required"
    server="server application $MARLINE_POD_ADDRESS:$MARLINE_PORT"
    rule="chain inbound {
        type nat hook prerouting priority dstnat
        tcp dport $MARLINE_PORT redirect to :$inbound
    }"
fi

cat >haproxy.cfg <<EOF
global
    uid $user
    gid $user
    nbthread 2
    log stderr format raw local0 warning
    ssl-default-bind-options ssl-min-ver TLSv1.3
    ssl-default-server-options ssl-min-ver TLSv1.3
defaults
    mode tcp
    maxconn 20000
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen pod
    $bind
    $server
EOF

nft -f - <<EOF
table ip external {
    $rule
}
EOF
haproxy -db -f haproxy.cfg &
proxy=$!
trap 'kill $proxy' TERM INT
# Ready is when the port answers for itself, as the kernel tells: 0A is a socket that listens.
port=$(printf ':%04X 00000000:0000 0A' "$( [ "$MARLINE_ROLE" = client ] && echo $outbound || echo $inbound )")
until grep -q "$port" /proc/net/tcp; do
    kill -0 $proxy
    sleep 0.05
done
touch "$MARLINE_READY"
wait $proxy
