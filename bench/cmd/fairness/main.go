// Command fairness measures how a TenantDB shares its connections among tenants, beside pgxpool alone in the
// same run, and draws a picture of it.
//
//	go run ./cmd/fairness
//	go run ./cmd/fairness -svg ../docs/fairness.svg
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/pgxtenant/pgxtenant/bench"
)

func main() {
	rounds := flag.Int("rounds", 4, "rounds of the flood, each on pgxpool alone and on a TenantDB")
	slice := flag.Duration("slice", 3*time.Second, "length of a slice of a round")
	backlog := flag.Duration("backlog", 10*time.Second, "length of the runs with all tenants backlogged")
	svg := flag.String("svg", "", "file to draw the picture into")
	flag.Parse()
	if err := run(context.Background(), *rounds, *slice, *backlog, *svg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, rounds int, slice, backlog time.Duration, svg string) (err error) {
	lab, err := bench.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	version, err := lab.Version(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("Client and server share %d CPUs. %s, PostgreSQL %s.\n\n", runtime.NumCPU(), runtime.Version(), version)

	plain, tenant, err := bench.Floods(ctx, lab, rounds, slice)
	if err != nil {
		return err
	}
	fmt.Printf("B's reads, %d rounds of %v each way, beside 64 goroutines of A's 20 ms queries on a pool of 8:\n", rounds, slice)
	fmt.Printf("%-12s %12s %12s %8s %12s %12s %8s %10s\n", "", "alone p50", "beside p50", "ratio", "alone p99", "beside p99", "ratio", "A's/s")
	for _, row := range []struct {
		name string
		of   bench.Flood
	}{{"pgxpool", plain}, {"pgxtenant", tenant}} {
		a50, b50 := bench.Quantile(row.of.Alone, 0.5), bench.Quantile(row.of.Beside, 0.5)
		a99, b99 := bench.Quantile(row.of.Alone, 0.99), bench.Quantile(row.of.Beside, 0.99)
		fmt.Printf("%-12s %12s %12s %8.2f %12s %12s %8.2f %10.1f\n", row.name, ms(a50), ms(b50), float64(b50)/float64(a50),
			ms(a99), ms(b99), float64(b99)/float64(a99), row.of.PerSecond())
	}
	fmt.Printf("A's throughput: %.3f of what pgxpool alone gives it\n\n", tenant.PerSecond()/plain.PerSecond())

	equal := make([]float64, 64)
	for i := range equal {
		equal[i] = 1
	}
	of, err := bench.Backlogs(ctx, lab, backlog, equal, 2, func(i int) time.Duration { return time.Duration(1+i%20) * time.Millisecond })
	if err != nil {
		return err
	}
	fmt.Printf("64 backlogged tenants that hold a connection for 1 to 20 ms, %v: Jain's index of connection time %.4f, pgxpool alone %.4f\n",
		backlog, bench.Jain(of.Tenant), bench.Jain(of.Plain))

	of, err = bench.Backlogs(ctx, lab, backlog/2, []float64{1, 2, 4}, 8, func(int) time.Duration { return 5 * time.Millisecond })
	if err != nil {
		return err
	}
	total := of.Tenant[0] + of.Tenant[1] + of.Tenant[2]
	fmt.Printf("3 backlogged tenants of weights 1, 2, 4, %v: shares times 7 are", backlog/2)
	for _, used := range of.Tenant {
		fmt.Printf(" %.3f", 7*used.Seconds()/total.Seconds())
	}
	fmt.Println()

	if svg == "" {
		return nil
	}
	return os.WriteFile(svg, picture(plain, tenant), 0o644)
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f ms", d.Seconds()*1000) }
