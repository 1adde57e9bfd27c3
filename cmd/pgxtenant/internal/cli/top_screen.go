package cli

import (
	"context"
	"io"
	"strings"
	"time"

	"github.com/jedib0t/go-pretty/v6/text"
	"golang.org/x/term"

	"github.com/pgxtenant/pgxtenant"
)

const (
	enterScreen = "\x1b[?1049h\x1b[?25l" // another screen, without a cursor
	leaveScreen = "\x1b[?25h\x1b[?1049l"
)

// live shows the state anew until it is told to end, and leaves the terminal as it was.
func (a *app) live(ctx context.Context, w *watch, state *pgxtenant.DebugState) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	keys := make(chan byte)
	if fd := int(a.in.Fd()); term.IsTerminal(fd) {
		before, err := term.MakeRaw(fd) // so that keys come at once, and are not shown
		if err != nil {
			return err
		}
		defer func() { _ = term.Restore(fd, before) }()
		go readKeys(ctx, a.in, keys)
	}
	_, _ = io.WriteString(a.out, enterScreen)
	defer func() { _, _ = io.WriteString(a.out, leaveScreen) }()
	tick := time.NewTicker(w.interval)
	defer tick.Stop()
	type answer struct {
		state *pgxtenant.DebugState
		err   error
	}
	answers := make(chan answer, 1)
	asking := false
	var trouble error
	for {
		if err := a.draw(w, state, trouble); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case key := <-keys:
			switch key {
			case 'q', 'Q', 3: // Ctrl-C is no signal in raw mode
				return nil
			case '1', '5', '6':
				w.window = map[byte]string{'1': "1m", '5': "5m", '6': "60m"}[key]
			}
		case <-tick.C:
			if asking {
				continue
			}
			asking = true
			go func() { // for keys are to count meanwhile
				fresh, err := w.fetch(ctx)
				answers <- answer{fresh, err}
			}()
			continue
		case got := <-answers:
			asking = false
			// A service that is restarted is seen again.
			if trouble = got.err; trouble == nil {
				state = got.state
			}
		}
	}
}

// readKeys may outlive ctx, in a read that nothing can stop; the program ends then.
func readKeys(ctx context.Context, from io.Reader, keys chan<- byte) {
	var b [1]byte
	for {
		if n, err := from.Read(b[:]); n == 0 || err != nil {
			return
		}
		select {
		case keys <- b[0]:
		case <-ctx.Done():
			return
		}
	}
}

func (a *app) draw(w *watch, state *pgxtenant.DebugState, trouble error) error {
	height := 24
	if width, h, err := term.GetSize(int(a.out.file.Fd())); err == nil && width > 0 && h > 0 {
		a.out.width, height = width, h
	}
	lines := a.topLines(w, state, max(height-1, 1)) // 0 would be all
	if trouble != nil {
		lines[0] = a.out.paint(red, text.Trim(printable(a.settings.masked(trouble.Error())), a.out.width))
	}
	// Over what is there, and not after an erasure, which would flicker.
	_, err := io.WriteString(a.out, "\x1b[H"+strings.Join(lines, "\x1b[K\r\n")+"\x1b[K\x1b[J")
	return err
}
