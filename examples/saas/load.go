package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/pgxtenant/pgxtenant"
)

// noisy is the tenant that does too much, at noisyAtOnce requests at a time: more than its plan allows.
const (
	noisy       = "globex"
	noisyAtOnce = 10
)

// quiet are tenants that read and write a little, with a pause after each request.
var quiet = map[string]time.Duration{
	"acme": 100 * time.Millisecond, "initech": 110 * time.Millisecond, "umbrella": 120 * time.Millisecond,
	"wonka": 1100 * time.Millisecond, // the free plan has one request a second
}

// driver sends requests to a service as its customers would, and asks it what operators would.
type driver struct {
	public, ops string // http://host:port
	domain      string
	length      time.Duration
	client      http.Client
}

// outcome is what one tenant's requests came to.
type outcome struct {
	mu      sync.Mutex
	codes   map[int]int
	took    []time.Duration // those that were answered with 200 or the like
	failure error           // the last request that got no answer
}

// drive sends load for d.length and prints how tenants fared, and then what the page and the metrics say.
func (d *driver) drive(ctx context.Context, out io.Writer) error {
	d.client.Transport = &http.Transport{MaxIdleConnsPerHost: noisyAtOnce + len(quiet)}
	defer d.client.CloseIdleConnections()
	outcomes, err := d.load(ctx)
	if err != nil {
		return err
	}
	fmt.Fprint(out, "\nWHAT CUSTOMERS SAW\n\n")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "tenant\tserved\tmedian\tworst\tanswers by status")
	for _, tenant := range slices.Sorted(maps.Keys(outcomes)) {
		o := outcomes[tenant]
		slices.Sort(o.took)
		var median, worst time.Duration
		if n := len(o.took); n > 0 {
			median, worst = o.took[n/2], o.took[n-1]
		}
		fmt.Fprintf(w, "%s\t%d\t%v\t%v\t%v\n", tenant, len(o.took), round(median), round(worst), o.codes)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if err := d.showPage(ctx, out); err != nil {
		return err
	}
	return d.showMetrics(ctx, out)
}

// load has all tenants send requests at the same time.
func (d *driver) load(ctx context.Context) (map[string]*outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, d.length)
	defer cancel()
	var senders sync.WaitGroup
	loud := &outcome{codes: make(map[int]int)}
	for range noisyAtOnce {
		senders.Go(func() { d.report(ctx, loud) })
	}
	outcomes := map[string]*outcome{noisy: loud}
	for tenant, pause := range quiet {
		o := &outcome{codes: make(map[int]int)}
		outcomes[tenant] = o
		senders.Go(func() { d.work(ctx, tenant, pause, o) })
	}
	senders.Wait()
	for tenant, o := range outcomes {
		if o.failure != nil {
			return nil, fmt.Errorf("%s: %w", tenant, o.failure)
		}
	}
	return outcomes, nil
}

// report asks for one report after another, and comes back as soon as a refusal says.
func (d *driver) report(ctx context.Context, o *outcome) {
	for ctx.Err() == nil {
		res, ok := d.send(ctx, o, noisy, http.MethodGet, "/report", "")
		if ok && res.StatusCode == http.StatusTooManyRequests {
			after, _ := strconv.Atoi(res.Header.Get("Retry-After"))
			sleep(ctx, time.Duration(after)*time.Second)
		}
	}
}

// work writes a project now and then, and reads.
func (d *driver) work(ctx context.Context, tenant string, pause time.Duration, o *outcome) {
	for n := 0; ctx.Err() == nil; n++ {
		if n%10 == 0 {
			d.send(ctx, o, tenant, http.MethodPost, "/projects", fmt.Sprintf(`{"name":"Project %d"}`, n))
		} else {
			d.send(ctx, o, tenant, http.MethodGet, "/projects", "")
		}
		sleep(ctx, pause)
	}
}

// send sends a request of a tenant and counts what becomes of it, unless ctx ended it. The body of res has been read.
func (d *driver) send(ctx context.Context, o *outcome, tenant, method, path, body string) (res *http.Response, ok bool) {
	r, err := http.NewRequestWithContext(ctx, method, d.public+path, strings.NewReader(body))
	if err != nil {
		panic(err) // its parts are ours
	}
	r.Host = tenant + "." + d.domain // not every system finds names below localhost
	r.Header.Set("Authorization", "Bearer "+tenant+"-key")
	r.Header.Set("Content-Type", "application/json")
	start := time.Now()
	res, err = d.client.Do(r)
	if err == nil {
		_, err = io.Copy(io.Discard, res.Body)
		err = errors.Join(err, res.Body.Close())
	}
	took := time.Since(start)
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return nil, false
	case err != nil:
		o.failure = err
		return nil, false
	}
	o.codes[res.StatusCode]++
	if res.StatusCode < 300 {
		o.took = append(o.took, took)
	}
	return res, true
}

// showPage prints what /debug/tenants tells.
func (d *driver) showPage(ctx context.Context, out io.Writer) error {
	body, err := d.ask(ctx, "/debug/tenants?format=json")
	if err != nil {
		return err
	}
	var state pgxtenant.DebugState
	if err := json.Unmarshal(body, &state); err != nil {
		return err
	}
	i := slices.IndexFunc(state.Windows, func(w pgxtenant.DebugWindow) bool { return w.Name == "5m" })
	if i < 0 || len(state.Windows[i].Tenants) == 0 {
		return errors.New("the page shows no load")
	}
	five := state.Windows[i]
	fmt.Fprintf(out, "\nWHAT THE PAGE SAYS of the last five minutes (%s/debug/tenants)\n\n", d.ops)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "tenant\tseconds\tof the shared database\tstatements\twaits")
	for _, t := range five.Tenants {
		fmt.Fprintf(w, "%s\t%.2f\t%.1f %%\t%d\t%d\n", t.Tenant, t.Time, 100*t.SharedShare, t.Statements, t.Waits)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if t := five.Tenants[0]; t.SharedShare >= state.HeavyShare {
		fmt.Fprintf(out, "\nThe noisy neighbour is %s: %.1f %% of the shared database's time is its own.\n", t.Tenant, 100*t.SharedShare)
	}
	return nil
}

// showMetrics prints those lines of /metrics that are about the noisy tenant, and what its requests came to.
func (d *driver) showMetrics(ctx context.Context, out io.Writer) error {
	body, err := d.ask(ctx, "/metrics")
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "\nWHAT THE METRICS SAY of %s (%s/metrics)\n\n", noisy, d.ops)
	lines := bufio.NewScanner(bytes.NewReader(body))
	for lines.Scan() {
		line := lines.Text()
		if strings.Contains(line, `tenant="`+noisy+`"`) || strings.Contains(line, "_requests_total{") && strings.Contains(line, routeReport) {
			fmt.Fprintln(out, line)
		}
	}
	return lines.Err()
}

// answers reports whether a service is there.
func (d *driver) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, err := d.ask(ctx, "/healthz")
	return err == nil
}

// ask gets a page of the operators'.
func (d *driver) ask(ctx context.Context, path string) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, d.ops+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := d.client.Do(r)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s%s: %s", d.ops, path, res.Status)
	}
	return body, err
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// round is for a table.
func round(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }
