# A prefork server as classic as can be: children that block in accept(2) on one listener, one connection at a time each.
#
#     perl prefork.pl PORT CHILDREN
use strict;
use warnings;
use IO::Socket::IP;

my ($port, $children) = @ARGV;
my $listener = IO::Socket::IP->new(LocalHost => "::", LocalPort => $port, Listen => 64, ReuseAddr => 1, V6Only => 0)
    or die "WRONG: cannot listen: $@\n";
$| = 1;
for (1 .. $children) {
    next if fork;
    while (accept(my $connection, $listener)) {
        syswrite(STDOUT, "peer $$\n");
        while (my $count = sysread($connection, my $data, 65_536)) {
            my $done = 0;
            while ($done < $count) {
                my $more = syswrite($connection, $data, $count - $done, $done);
                die "WRONG: cannot write: $!\n" unless defined $more;
                $done += $more;
            }
        }
        close($connection);
    }
    die "WRONG: accept: $!\n";
}
sleep while wait != -1;
