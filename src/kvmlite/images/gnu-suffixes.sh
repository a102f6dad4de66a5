#!/bin/busybox sh
# busybox counts in b, k and m; scripts written for GNU tools say K, M and G.
name=${0##*/} first=1 counting=
for word; do
	[ -n "$first" ] && set -- && first=
	case $counting$word in
	-[cn]*[0-9]K | count*[0-9]K) word=${word%K}k ;;
	-[cn]*[0-9]M | count*[0-9]M) word=${word%M}m ;;
	-[cn]*[0-9]G | count*[0-9]G) word=$((${word%G} * 1024))m ;;
	esac
	case $word in -c | -n | --bytes | --lines) counting=count ;; *) counting= ;; esac
	set -- "$@" "$word"
done
exec /bin/busybox "$name" "$@"
