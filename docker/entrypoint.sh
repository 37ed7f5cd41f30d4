#!/bin/sh
# docker run hilorec:cpu --nproc_per_node 2 -m recsys.train ...: options are torchrun's.
# docker run hilorec:cpu python -m recsys.doctor: anything else is a command, as TorchX gives one.
set -eu

case "${1:-}" in
"" | -*) set -- torchrun "$@" ;;
esac

# torchrun tells ranks to meet at this container's full name, even those of one machine. Where that does not resolve,
# they look for it in silence until a time-out of minutes. torchrun takes PET_LOCAL_ADDR for --local-addr.
if [ -z "${PET_LOCAL_ADDR:-}" ] &&
	! python -c 'import socket; socket.getaddrinfo(socket.getfqdn(), None)' 2>/dev/null; then
	export PET_LOCAL_ADDR=127.0.0.1
fi
exec "$@"
