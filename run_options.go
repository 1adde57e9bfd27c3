package pgxtenant

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	osuser "os/user"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// withDefaults returns a copy whose zero fields are filled in.
func (o ForEachOptions) withDefaults() ForEachOptions {
	if o.Name == "" {
		o.Name = time.Now().UTC().Format("2006-01-02 15:04:05 ") + newRunner()[:8] // no two share one
	}
	if o.By == "" {
		o.By = whoami()
	}
	o.Concurrency = orDefault(o.Concurrency, DefaultRunConcurrency)
	o.PerServer = orDefault(o.PerServer, o.Concurrency)
	o.LockTimeout = orDefault(o.LockTimeout, DefaultRunLockTimeout)
	o.StatementTimeout = orDefault(o.StatementTimeout, DefaultRunStatementTimeout)
	o.Attempts = orDefault(o.Attempts, DefaultRunAttempts)
	o.Lease = orDefault(o.Lease, DefaultRunLease)
	o.Patience = orDefault(o.Patience, DefaultRunPatience)
	o.Isolations, o.Plans, o.IDs = sortedCopy(o.Isolations), sortedCopy(o.Plans), sortedCopy(o.IDs)
	o.Canaries, o.Waves = sortedCopy(o.Canaries), slices.Clone(o.Waves)
	return o
}

// sortedCopy is a copy in order and without repetitions, nil if list is.
func sortedCopy[T ~string | ~uint8](list []T) []T {
	list = slices.Clone(list)
	slices.Sort(list)
	return slices.Compact(list)
}

// validate reports every bad field, not only the first. It is given options with their defaults filled in.
func (o ForEachOptions) validate() error {
	var errs []error
	fail := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("pgxtenant: ForEachOptions."+format, args...))
	}
	text := func(field, value string) {
		if len(value) > maxRunName || strings.IndexByte(value, 0) >= 0 || !utf8.ValidString(value) {
			fail("%s %q is longer than %d bytes, has a NUL byte or is not UTF-8", field, clip(value), maxRunName)
		}
	}
	text("Name", o.Name)
	text("By", o.By)
	text("Target", o.Target)
	for _, plan := range o.Plans {
		text("Plans", plan)
	}
	if o.Fresh && o.FailedOnly {
		fail("Fresh and FailedOnly are both set; FailedOnly goes on with a run")
	}
	for _, i := range o.Isolations {
		if i > IsolationDatabase {
			fail("Isolations has an unknown isolation %v", i)
		}
	}
	valid := func(field string, ids []string) {
		for _, id := range ids {
			if err := ValidateID(id); err != nil {
				fail("%s has %q: %w", field, clip(id), err)
			}
		}
	}
	valid("IDs", o.IDs)
	valid("Canaries", o.Canaries)
	if !(o.Percent >= 0 && o.Percent <= 100) { // nor is NaN
		fail("Percent is %v; want 0 to 100", o.Percent)
	}
	if o.Target != "" && o.Versions == nil {
		fail("Target is %q and Versions is nil; nothing says which version a tenant is at", clip(o.Target))
	}
	last := 0.0
	for i, w := range o.Waves {
		if !(w > last && w <= 100) {
			fail("Waves[%d] is %v; want more than %v, and 100 at most", i, w, last)
		}
		last = w
	}
	if !(o.StopRate >= 0 && o.StopRate <= 1) {
		fail("StopRate is %v; want 0 to 1", o.StopRate)
	}
	for _, n := range []struct {
		name  string
		value int
	}{{"StopAfter", o.StopAfter}, {"Concurrency", o.Concurrency}, {"PerServer", o.PerServer}, {"Attempts", o.Attempts}} {
		if n.value < 0 {
			fail("%s is %d; want 0 or more", n.name, n.value)
		}
	}
	if o.Concurrency > MaxRunConcurrency {
		fail("Concurrency is %d; want %d at most", o.Concurrency, MaxRunConcurrency)
	}
	if o.Timeout < 0 {
		fail("Timeout is %v; want 0 or more", o.Timeout)
	}
	if o.Lease < time.Second {
		fail("Lease is %v; want a second or more", o.Lease)
	}
	return errors.Join(errs...)
}

// maxRunName is the most bytes of the texts that a run is described by.
const maxRunName = 200

// narrowed reports whether not all tenants of the Isolations are selected.
func (o *ForEachOptions) narrowed() bool {
	return o.Plans != nil || o.IDs != nil || o.Percent != 0 || o.Select != nil
}

// has reports whether tenants with the isolation are selected.
func (o *ForEachOptions) has(i Isolation) bool {
	return o.Isolations == nil || slices.Contains(o.Isolations, i)
}

// selects reports whether a tenant that the registry's query has found is selected.
func (o *ForEachOptions) selects(t Tenant) bool {
	return (o.Percent == 0 || StablePercent(t.ID) < o.Percent) && (o.Select == nil || o.Select(t))
}

// chooses is selects for a tenant that no query has looked for.
func (o *ForEachOptions) chooses(t Tenant) bool {
	return o.has(t.Isolation) && (o.Plans == nil || slices.Contains(o.Plans, t.Plan)) && (o.IDs == nil || slices.Contains(o.IDs, t.ID)) &&
		!(o.SkipShared && t.Isolation == IsolationRow) && o.selects(t)
}

func (o *ForEachOptions) isCanary(t Tenant) bool {
	_, named := slices.BinarySearch(o.Canaries, t.ID)
	return named
}

// fingerprint is what a call must have in common with the run that it resumes: what is to be done, and not how.
func (o *ForEachOptions) fingerprint() string {
	var isolations []string
	for _, i := range o.Isolations {
		isolations = append(isolations, i.String())
	}
	text, _ := json.Marshal(struct { // fails on no such value
		Target     string   `json:"target,omitempty"`
		Isolations []string `json:"isolations,omitempty"`
		Plans      []string `json:"plans,omitempty"`
		IDs        []string `json:"ids,omitempty"`
		Percent    float64  `json:"percent,omitempty"`
	}{o.Target, isolations, o.Plans, o.IDs, o.Percent})
	return string(text)
}

// StablePercent places a tenant ID between 0, included, and 100, excluded: evenly, and always in the same place.
func StablePercent(tenantID string) float64 {
	sum := sha256.Sum256([]byte(tenantID))
	return float64(binary.BigEndian.Uint64(sum[:])>>11) / (1 << 53) * 100
}

// whoami is the user and host of the process.
func whoami() string {
	name := "unknown"
	if u, err := osuser.Current(); err == nil {
		name = u.Username
	}
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	return clip(strings.ToValidUTF8(name+"@"+host, "?"))
}
