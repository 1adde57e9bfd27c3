package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pgxtenant/pgxtenant"
)

// watch is what top is told.
type watch struct {
	url      string
	headers  []string
	window   string
	interval time.Duration
	once     bool
	asJSON   bool

	request *http.Request
	client  *http.Client
}

var windows = []string{"1m", "5m", "60m"}

func (a *app) topCommand() *cobra.Command {
	var w watch
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Watch the heavy tenants and pools of a running service",
		Long: `Watches a running service, by the JSON of its TenantDB.DebugHandler: the tenants
that use the most of the database's time, the pools, and what went wrong lately.

On a terminal it shows that anew every --interval, until q or Ctrl-C; 1, 5 and 6
choose the window. Elsewhere, and with --once, it prints it once. What gets it
past the service's own authentication goes in a header; the config file keeps
one out of sight:

    top:
      url: https://shop.example.com/debug/tenants
      headers:
        Authorization: Bearer ...`,
		Example: `  pgxtenant top --url http://localhost:6060/debug/tenants
  pgxtenant top --window 1m --interval 1s
  pgxtenant top --json --once | jq .conns`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.prepareTop(&w); err != nil {
				return err
			}
			return a.top(cmd.Context(), &w)
		},
	}
	f := cmd.Flags()
	f.StringVar(&w.url, "url", "", "`URL` of the service's DebugHandler (PGXTENANT_TOP_URL)")
	f.StringArrayVar(&w.headers, "header", nil, "a header `'Name: value'` to send; may be repeated")
	f.StringVar(&w.window, "window", "5m", "of the tenants: `1m`, 5m or 60m")
	f.DurationVar(&w.interval, "interval", 2*time.Second, "how often to look, 100ms at least")
	f.BoolVar(&w.once, "once", false, "look once")
	f.BoolVar(&w.asJSON, "json", false, "print the service's JSON, an object per line")
	choices(cmd, "window", windows...)
	return cmd
}

func (a *app) prepareTop(w *watch) error {
	s := &a.settings.Top
	if w.url != "" {
		s.URL = w.url
	}
	switch {
	case s.URL == "":
		return usagef("this needs the address of a service: --url, %sTOP_URL, or top.url in the config file", envPrefix)
	case !slices.Contains(windows, w.window):
		return usagef("there is no window %q; want 1m, 5m or 60m", w.window)
	case w.interval < 100*time.Millisecond:
		return usagef("--interval is %v; want 100ms or more", w.interval)
	}
	u, err := url.Parse(s.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return usagef("the address of the service is no http or https URL")
	}
	query := u.Query()
	query.Set("format", "json")
	u.RawQuery = query.Encode()
	if w.request, err = http.NewRequest(http.MethodGet, u.String(), nil); err != nil {
		return usagef("the address of the service is no http or https URL")
	}
	for name, value := range s.Headers {
		w.request.Header.Set(name, value)
	}
	for _, header := range w.headers {
		name, value, ok := strings.Cut(header, ":")
		if !ok {
			return usagef("--header: want 'Name: value'")
		}
		a.settings.hide(strings.TrimSpace(value))
		w.request.Header.Set(strings.TrimSpace(name), strings.TrimSpace(value))
	}
	// A redirect would take the headers along.
	w.client = &http.Client{Timeout: max(w.interval, 10*time.Second),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return nil
}

func (a *app) top(ctx context.Context, w *watch) error {
	defer w.client.CloseIdleConnections()
	state, err := w.fetch(ctx)
	if err != nil {
		return ended(ctx, err)
	}
	if !w.asJSON && !w.once && a.out.terminal() {
		return a.live(ctx, w, state)
	}
	tick := time.NewTicker(w.interval)
	defer tick.Stop()
	for {
		if w.asJSON {
			err = a.out.json(state)
		} else {
			_, err = io.WriteString(a.out, strings.Join(a.topLines(w, state, 0), "\n")+"\n")
		}
		if err != nil || w.once || !w.asJSON {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		if state, err = w.fetch(ctx); err != nil {
			return ended(ctx, err)
		}
	}
}

// ended is no error if the program was told to end.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// fetch asks the service.
func (w *watch) fetch(ctx context.Context) (*pgxtenant.DebugState, error) {
	response, err := w.client.Do(w.request.Clone(ctx))
	if err != nil {
		if e := (*url.Error)(nil); errors.As(err, &e) {
			err = e.Err // the rest is the address, which may hold a secret
		}
		return nil, fmt.Errorf("ask the service: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the service answers %s", printable(response.Status))
	}
	const most = 16 << 20
	var state pgxtenant.DebugState
	if err := json.NewDecoder(io.LimitReader(response.Body, most)).Decode(&state); err != nil || len(state.Windows) == 0 && !state.LoadOff {
		return nil, errors.New("what answers there is no DebugHandler: it gives no JSON of its kind")
	}
	return &state, nil
}
