# Runs at most one program at a time for the process that holds the other end of
# standard input. When that end closes, whatever the reason, it stops the program
# and removes the folder. Each line is a command, answered by one line, "ok" or not:
#
#   run COMMAND    runs it to its end
#   start COMMAND  starts it in the background
#   stop SIGNAL    signals what was started, and waits until it has ended
#
# Arguments: the folder, and the signal that ends the program at once.
dir=$1 last=$2
child=
cd "$dir" || exit 1
ulimit -c 0

# The pid is signalled only while its parent, the group below, has not reaped it:
# so it cannot be another process's by now.
stop() {
	[ -n "$child" ] || return 0
	[ -e exit ] || kill -"$1" "$(cat pid)"
	wait "$child"
	child=
}

finish() {
	stop "$last"
	cd /
	rm -rf "$dir"
	exit
}
trap finish HUP INT TERM
trap '' PIPE # nobody may be there to read an answer

while read -r verb arg; do
	case $verb in
	run)
		eval "$arg" >>log 2>&1 </dev/null && echo ok || echo "exit status $?"
		;;
	start)
		rm -f exit
		{
			eval "exec $arg" >>log 2>&1 </dev/null &
			echo $! >pid
			echo ok
			wait $!
			echo $? >exit
		} 2>>log &
		child=$!
		;;
	stop)
		stop "$arg" 2>>log
		echo ok
		;;
	esac
done
finish
