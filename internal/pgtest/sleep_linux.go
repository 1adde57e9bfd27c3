package pgtest

import (
	"syscall"
	"time"
)

// sleep holds a thread for d. On an idle machine time.Sleep may take up to a
// millisecond longer: the runtime waits for timers in whole milliseconds.
func sleep(d time.Duration) {
	left := syscall.NsecToTimespec(int64(d))
	for syscall.Nanosleep(&left, &left) == syscall.EINTR { // left is what remains
	}
}
