package pgxtenant

import (
	"context"
	"log/slog"
	"slices"
	"strconv"
)

// logKey is the attribute that LogHandler adds.
const logKey = "tenant"

// LogHandler returns a handler that adds the attribute "tenant", the ID of the tenant that the context carries,
// to each record on its way to next. It stands at the top, outside of all groups. Records without a tenant pass as
// they are. Log by the methods that take a context, such as [slog.Logger.InfoContext].
func LogHandler(next slog.Handler) slog.Handler { return &logHandler{top: next, inner: next} }

type logHandler struct {
	top   slog.Handler // with what came before the first group
	inner slog.Handler // with everything
	steps []logStep    // from top to inner
}

// logStep is a call of WithGroup or of WithAttrs.
type logStep struct {
	group string
	attrs []slog.Attr
}

func (h *logHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.inner.Enabled(ctx, level)
}

func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	t, ok := FromContext(ctx)
	if !ok {
		return h.inner.Handle(ctx, r)
	}
	id := t.ID
	if ValidateID(id) != nil {
		id = strconv.Quote(clip(id)) // WithTenant takes anything, and a log may go to a terminal
	}
	if len(h.steps) == 0 {
		r = r.Clone()
		r.AddAttrs(slog.String(logKey, id))
		return h.inner.Handle(ctx, r)
	}
	// Once a group is open, nothing can be added outside of it: the steps are taken anew behind the tenant.
	next := h.top.WithAttrs([]slog.Attr{slog.String(logKey, id)})
	for _, s := range h.steps {
		next = s.on(next)
	}
	return next.Handle(ctx, r)
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	if len(attrs) == 0 {
		return h
	}
	if len(h.steps) == 0 {
		top := h.top.WithAttrs(attrs)
		return &logHandler{top: top, inner: top}
	}
	return h.with(logStep{attrs: attrs})
}

func (h *logHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	return h.with(logStep{group: name})
}

func (h *logHandler) with(s logStep) slog.Handler {
	return &logHandler{top: h.top, inner: s.on(h.inner), steps: append(slices.Clip(h.steps), s)}
}

func (s logStep) on(h slog.Handler) slog.Handler {
	if s.group != "" {
		return h.WithGroup(s.group)
	}
	return h.WithAttrs(s.attrs)
}
