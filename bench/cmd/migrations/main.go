// Command migrations measures what migrations over many schema tenants cost, beside goose alone in the same run on the same
// server, by turns.
//
//	go run ./cmd/migrations
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"time"

	"github.com/pgxtenant/pgxtenant/bench"
)

var (
	tenants = flag.Int("tenants", 1000, "schema tenants")
	rounds  = flag.Int("rounds", 5, "rounds of each comparison; the order of the two changes with each")
	many    = flag.Int("many", 10_000, "tenants in the registry where memory is measured")
	durable = flag.Bool("durable", true, "the server waits for its disk at each commit, as one that is in use does")
	check   = flag.Bool("check", false, "exit with status 1 if a row is over its limit")
)

func main() {
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "migrations:", err)
	}
	if err != nil || over && *check {
		os.Exit(1)
	}
}

var over bool // a row was over its limit

// row prints a comparison. A limit of zero is none.
func row(what, base, way string, ratio, limit float64, unit string) {
	verdict := fmt.Sprintf("≤ %v: within", limit)
	switch {
	case limit == 0:
		verdict = ""
	case ratio > limit:
		verdict, over = fmt.Sprintf("≤ %v: OVER", limit), true
	}
	fmt.Printf("%-58s %12s %12s %8.3f %s %s\n", what, base, way, ratio, unit, verdict)
}

func run(ctx context.Context) (err error) {
	if *rounds < 1 || *tenants < 1 || flag.NArg() > 0 {
		return fmt.Errorf("want -rounds and -tenants of 1 or more, and no arguments")
	}
	lab, err := bench.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	if *durable {
		if err := lab.Durable(ctx); err != nil {
			return err
		}
	}
	version, err := lab.Version(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("Client and server share %d CPUs. %s, PostgreSQL %s, waiting for the disk: %v, load %s.\n", runtime.NumCPU(), runtime.Version(), version, *durable, load())
	fmt.Printf("%-58s %12s %12s %8s\n", "", "goose", "tenantgoose", "ratio")
	for _, part := range []func(context.Context, *bench.Lab) error{fleet, near, far, memory} {
		if err := part(ctx, lab); err != nil {
			return err
		}
	}
	fmt.Printf("Load at the end: %s.\n", load())
	return nil
}

// fleet is about tenants that have to be looked at, and those that one small migration is for.
func fleet(ctx context.Context, lab *bench.Lab) error {
	f, err := bench.OpenFleet(ctx, lab, *tenants)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, part := range []struct {
		what    string
		prepare func()
		done    int
	}{
		{"nothing to apply", func() {}, 0},
		{"a column and an index", f.AddSmall, *tenants + 1},
	} {
		var goose, ours []time.Duration
		byGoose := func() error {
			part.prepare()
			d, err := f.UpByGoose(ctx)
			goose = append(goose, d)
			return err
		}
		byUs := func() error {
			part.prepare()
			d, report, err := f.Up(ctx, nil)
			if err == nil && report.Done != part.done {
				err = fmt.Errorf("%d tenants were migrated, not %d", report.Done, part.done)
			}
			ours = append(ours, d)
			return err
		}
		for round := range *rounds {
			both := []func() error{byGoose, byUs}
			if round%2 == 1 {
				slices.Reverse(both)
			}
			for _, one := range both {
				if err := one(); err != nil {
					return err
				}
			}
		}
		g, o := median(goose), median(ours)
		what := fmt.Sprintf("%s, %d schemas, 2 workers", part.what, *tenants)
		if part.done == 0 {
			row(what, text(g), text(o), slices.Max(ours).Seconds(), bench.MaxCheck.Seconds(), "s at most")
			continue
		}
		row(what, text(g), text(o), ratio(ours, goose), bench.MaxMigrateRatio, "")
	}
	return nil
}

func near(ctx context.Context, lab *bench.Lab) error { return onboard(ctx, lab, false) }
func far(ctx context.Context, lab *bench.Lab) error  { return onboard(ctx, lab, true) }

// onboard is about a new tenant.
func onboard(ctx context.Context, lab *bench.Lab, far bool) error {
	o, err := bench.OpenOnboard(ctx, lab, far)
	if err != nil {
		return err
	}
	defer o.Close()
	var goose, copied, stocked []time.Duration
	for round := range *rounds * 2 {
		if err := o.Stock(ctx, 1); err != nil {
			return err
		}
		// The one in stock is the first to go; the other two change places.
		d, err := o.ByCopy(ctx, fmt.Sprintf("stocked%d", round))
		stocked = append(stocked, d)
		for side := 0; side < 2 && err == nil; side++ {
			if side == round%2 {
				d, err = o.ByGoose(ctx, round)
				goose = append(goose, d)
			} else {
				d, err = o.ByCopy(ctx, fmt.Sprintf("copied%d", round))
				copied = append(copied, d)
			}
		}
		if err != nil {
			return err
		}
	}
	distance := ""
	if far {
		distance = ", 1 ms away"
	}
	row("a new tenant, of 100 migrations, from stock"+distance, text(median(goose)), text(median(stocked)), ratio(stocked, goose), bench.MaxNewRatio, "")
	row("a new tenant, of 100 migrations, copied now"+distance, text(median(goose)), text(median(copied)), ratio(copied, goose), 0, "")
	return nil
}

// memory is about many tenants in the registry.
func memory(ctx context.Context, lab *bench.Lab) error {
	var heap [2]float64
	for i, n := range []int{100, *many} {
		f, err := bench.OpenFleet(ctx, lab, n)
		if err != nil {
			return err
		}
		f.AddSmall()
		bytes, done, err := f.LiveHeap(ctx)
		f.Close()
		if err == nil && done != n+1 {
			err = fmt.Errorf("%d tenants were migrated, not %d", done, n+1)
		}
		if err != nil {
			return err
		}
		heap[i] = float64(bytes)
	}
	mb := func(b float64) string { return fmt.Sprintf("%.2f MB", b/(1<<20)) }
	row(fmt.Sprintf("live heap, 100 and %d tenants", *many), mb(heap[0]), mb(heap[1]), heap[1]/heap[0], bench.MaxFleetRatio, "")
	return nil
}

func median(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

// ratio is the median of the rounds' ratios.
func ratio(ours, base []time.Duration) float64 {
	var r []float64
	for i := range ours {
		r = append(r, float64(ours[i])/float64(base[i]))
	}
	slices.Sort(r)
	return r[len(r)/2]
}

func text(d time.Duration) string { return d.Round(10 * time.Microsecond).String() }

// load is the machine's, where the system tells it: of the last minute, five, and fifteen.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	var one, five, fifteen string
	_, _ = fmt.Sscan(string(b), &one, &five, &fifteen)
	return one + " " + five + " " + fifteen
}
