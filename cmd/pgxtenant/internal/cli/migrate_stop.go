package cli

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// gently takes signals over from Main, whose context is not to be used any more. It makes of the first Ctrl-C a wish
// that a run stops, and of the second one the end of its context. A third one ends the program. release ends it.
// A terminal that goes away may say so more than once, so SIGHUP is no more than that wish. That whoever reads the output has
// gone, as head does, is no reason to die in the middle of a run.
func (a *app) gently(ctx context.Context, say func(string)) (running context.Context, stop chan struct{}, release func()) {
	signal.Ignore(syscall.SIGPIPE)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, endings()...)
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop = make(chan struct{})
	if ctx.Err() != nil { // it came before
		close(stop)
		cancel()
	}
	a.signalsOff()
	a.ownSignals = true
	over := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for running.Err() == nil {
			var got os.Signal
			select {
			case got = <-signals:
			case <-over:
				return
			}
			select {
			case <-stop:
				if got == syscall.SIGHUP {
					continue
				}
				signal.Stop(signals)
				say("Cancelling.")
				cancel()
			default:
				say("Stopping when the tenants that are being worked on are done. Ctrl-C again cancels them.")
				close(stop)
			}
		}
	})
	return running, stop, func() {
		signal.Stop(signals)
		close(over)
		wg.Wait()
		cancel()
	}
}
