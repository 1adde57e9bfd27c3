package pgxtenant

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"
	"testing/slogtest"

	"github.com/stretchr/testify/require"
)

func TestALogRecordHasItsTenantAtTheTop(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	plain := slog.New(LogHandler(slog.NewJSONHandler(&out, &slog.HandlerOptions{ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{}
		}
		return a
	}})))
	acme := WithTenant(context.Background(), Tenant{ID: "acme"})
	for want, log := range map[string]func(){
		`{"msg":"m","a":1,"tenant":"acme"}`:       func() { plain.InfoContext(acme, "m", "a", 1) },
		`{"msg":"m","a":1}`:                       func() { plain.InfoContext(context.Background(), "m", "a", 1) },
		`{"msg":"m"}`:                             func() { plain.InfoContext(WithoutTenant(acme), "m") },
		`{"msg":"m","tenant":"globex"}`:           func() { plain.InfoContext(WithTenantID(acme, "globex"), "m") },
		`{"msg":"m","b":2,"a":1,"tenant":"acme"}`: func() { plain.With("b", 2).InfoContext(acme, "m", "a", 1) },
		`{"msg":"m","tenant":"acme","g":{"a":1}}`: func() { plain.WithGroup("g").InfoContext(acme, "m", "a", 1) },
		`{"msg":"m","g":{"a":1}}`:                 func() { plain.WithGroup("g").Info("m", "a", 1) },
		`{"msg":"m","b":2,"tenant":"acme","g":{"c":3,"h":{"d":4,"a":1}}}`: func() {
			plain.With("b", 2).WithGroup("g").With("c", 3).WithGroup("h").With("d", 4).InfoContext(acme, "m", "a", 1)
		},
		`{"msg":"m","tenant":"\"a\\nb\\u001b\""}`: func() { plain.InfoContext(WithTenantID(acme, "a\nb\x1b"), "m") },
	} {
		out.Reset()
		log()
		require.JSONEq(t, strings.ReplaceAll(want, `\\u001b`, `\\x1b`), out.String())
	}
	require.Equal(t, plain.Handler(), plain.WithGroup("").Handler())
}

func TestLoggersOfOneParentShareNothing(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	parent := slog.New(LogHandler(slog.NewJSONHandler(&out, nil))).WithGroup("g").With("a", 1)
	first, second := parent.With("b", 2), parent.With("c", 3)
	first.InfoContext(WithTenantID(context.Background(), "acme"), "m")
	require.Contains(t, out.String(), `"tenant":"acme","g":{"a":1,"b":2}`)
	out.Reset()
	second.InfoContext(WithTenantID(context.Background(), "acme"), "m")
	require.Contains(t, out.String(), `"tenant":"acme","g":{"a":1,"c":3}`)
}

// The handler keeps slog's own rules, with a tenant and without.
func TestLogHandlerIsAWellBehavedHandler(t *testing.T) {
	for name, ctx := range map[string]context.Context{"tenant": WithTenantID(context.Background(), "acme"), "none": context.Background()} {
		var out bytes.Buffer
		slogtest.Run(t, func(*testing.T) slog.Handler {
			out.Reset()
			return inContext{LogHandler(slog.NewJSONHandler(&out, nil)), ctx}
		}, func(t *testing.T) map[string]any {
			var got map[string]any
			require.NoError(t, json.Unmarshal(out.Bytes(), &got))
			if name == "tenant" {
				require.Equal(t, "acme", got["tenant"])
			}
			return got
		})
	}
}

// inContext hands every record on in a context of its own.
type inContext struct {
	slog.Handler
	ctx context.Context
}

func (h inContext) Handle(_ context.Context, r slog.Record) error { return h.Handler.Handle(h.ctx, r) }
func (h inContext) WithAttrs(a []slog.Attr) slog.Handler {
	return inContext{h.Handler.WithAttrs(a), h.ctx}
}
func (h inContext) WithGroup(g string) slog.Handler { return inContext{h.Handler.WithGroup(g), h.ctx} }
