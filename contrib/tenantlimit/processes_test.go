package tenantlimit

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// envWorker makes a process of the test binary a worker, and holds its job.
const envWorker = "TENANTLIMIT_WORKER"

// job is what a worker does.
type job struct {
	Socket, Prefix string
	Plan           Plan
	Lease          time.Duration
	Calls          int  // to make, of the tenant acme
	Hold           bool // what passed, until standard input ends
}

// work makes its calls when it is told to, and says how many passed.
func work() {
	var j job
	must(json.Unmarshal([]byte(os.Getenv(envWorker)), &j))
	client := redis.NewClient(&redis.Options{Network: "unix", Addr: j.Socket})
	config := plan(j.Plan)
	config.Redis, config.Prefix, config.Lease, config.Timeout = client, j.Prefix, j.Lease, time.Minute
	l, err := New(config)
	must(err)
	stdin := bufio.NewReader(os.Stdin)
	fmt.Println("ready")
	_, err = stdin.ReadString('\n')
	must(err)
	var calls sync.WaitGroup
	var passed atomic.Int64
	for range 4 {
		calls.Go(func() {
			for range j.Calls / 4 {
				if g, err := l.Take(as("acme"), Call{}); err == nil {
					passed.Add(1)
					if !j.Hold {
						g.Release()
					}
				}
			}
		})
	}
	calls.Wait()
	fmt.Println(passed.Load())
	_, _ = io.Copy(io.Discard, stdin)
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// worker is a process that does a job.
type worker struct {
	*exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
}

// startWorkers starts n processes, which are ready to begin.
func startWorkers(t *testing.T, n int, j job) []worker {
	t.Helper()
	text, err := json.Marshal(j)
	require.NoError(t, err)
	workers := make([]worker, n)
	for i := range workers {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), envWorker+"="+string(text))
		cmd.Stderr = os.Stderr
		stdin, err := cmd.StdinPipe()
		require.NoError(t, err)
		stdout, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		t.Cleanup(func() {
			_ = cmd.Process.Kill() // an end of its own takes a second under the race detector
			_ = cmd.Wait()
		})
		workers[i] = worker{cmd, stdin, bufio.NewReader(stdout)}
	}
	for _, w := range workers {
		line, err := w.stdout.ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "ready\n", line)
	}
	return workers
}

// run has all workers begin, and sums up what passed.
func run(t *testing.T, workers []worker) (passed int) {
	t.Helper()
	for _, w := range workers {
		_, err := io.WriteString(w.stdin, "go\n")
		require.NoError(t, err)
	}
	for _, w := range workers {
		var n int
		_, err := fmt.Fscan(w.stdout, &n)
		require.NoError(t, err)
		passed += n
	}
	return passed
}

func TestEightProcessesPassExactlyTheRate(t *testing.T) {
	t.Parallel()
	p := rated(PerHour(1, 500))
	workers := startWorkers(t, 8, job{Socket: server(t).Addr, Prefix: prefix(t), Plan: p, Calls: 120, Lease: time.Minute})
	require.Equal(t, 500, run(t, workers))
}

func TestSlotsOfKilledProcessesComeBack(t *testing.T) {
	t.Parallel()
	const lease = shortLease
	config := plan(slots(20))
	config.Lease = lease
	l := shared(t, config)
	workers := startWorkers(t, 8, job{Socket: server(t).Addr, Prefix: l.config.Prefix, Plan: slots(20), Calls: 40, Hold: true, Lease: lease})
	require.Equal(t, 20, run(t, workers), "8 processes hold exactly the limit")
	leases := keysOf(t, l)
	require.Len(t, leases, 1)
	before := scores(t, l, leases[0])
	require.Eventually(t, func() bool {
		for id, till := range scores(t, l, leases[0]) {
			if till < before[id]+float64(lease.Microseconds()) {
				return false
			}
		}
		return true
	}, time.Minute, 10*time.Millisecond, "processes that live keep their slots past the lease")
	refused(t, l, "acme", Call{}, KindConcurrency)

	for _, w := range workers {
		require.NoError(t, w.Process.Kill())
	}
	require.Eventually(t, func() bool {
		g, err := l.Take(as("acme"), Call{})
		g.Release()
		return err == nil && g.State.UnderWay == 1
	}, time.Minute, 10*time.Millisecond)
}

func scores(t *testing.T, l *Limiter, key string) map[string]float64 {
	t.Helper()
	members, err := l.config.Redis.ZRangeWithScores(context.Background(), key, 0, -1).Result()
	require.NoError(t, err)
	found := map[string]float64{}
	for _, m := range members {
		found[m.Member.(string)] = m.Score
	}
	return found
}
