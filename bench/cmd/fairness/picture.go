package main

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/pgxtenant/pgxtenant/bench"
)

// Measures of the picture, in pixels, and of its axis, in milliseconds.
const (
	width, height          = 760, 330
	left, right, top, foot = 64, 24, 58, 52
	axisFrom, axisTo       = 0.1, 1000.0
)

// picture draws how many of B's reads take how long at most.
func picture(plain, tenant bench.Flood) []byte {
	var b bytes.Buffer
	text := func(x, y float64, anchor, style, format string, args ...any) {
		fmt.Fprintf(&b, `<text x="%.0f" y="%.0f" text-anchor="%s" %s>%s</text>`+"\n", x, y, anchor, style, fmt.Sprintf(format, args...))
	}
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13" fill="#333">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", width, height)
	text(left, 24, "start", `font-size="16" font-weight="bold"`, "Tenant B's reads beside tenant A's 64 goroutines of 20 ms queries, pool of 8")
	text(left, 43, "start", `fill="#666"`, "part of the reads that take so long at most")
	for at := axisFrom; at <= axisTo*1.01; at *= 10 {
		x := xOf(at)
		fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#ddd"/>`+"\n", x, top, x, height-foot)
		text(x, height-foot+18, "middle", "", "%g ms", at)
	}
	for _, part := range []float64{0, 0.5, 1} {
		y := yOf(part)
		fmt.Fprintf(&b, `<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#ddd"/>`+"\n", left, y, width-right, y)
		text(left-8, y+4, "end", "", "%.0f %%", part*100)
	}
	for i, c := range []struct {
		name, colour string
		reads        []time.Duration
	}{
		{"B alone", "#888888", tenant.Alone},
		{"pgxtenant", "#1a7f37", tenant.Beside},
		{"pgxpool", "#cf222e", plain.Beside},
	} {
		fmt.Fprintf(&b, `<path fill="none" stroke="%s" stroke-width="2.5" d="%s"/>`+"\n", c.colour, curve(c.reads))
		text(left+float64(i)*220, height-12, "start", fmt.Sprintf(`fill="%s" font-weight="bold"`, c.colour), "%s: p50 %s, p99 %s",
			c.name, ms(bench.Quantile(c.reads, 0.5)), ms(bench.Quantile(c.reads, 0.99)))
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// curve is the path of a cumulative distribution, in 200 steps.
func curve(reads []time.Duration) string {
	sorted := slices.Sorted(slices.Values(reads))
	var b bytes.Buffer
	const steps = 200
	for i := range steps + 1 {
		part := float64(i) / steps
		at := sorted[min(int(part*float64(len(sorted))), len(sorted)-1)]
		command := "L"
		if i == 0 {
			command = "M"
		}
		fmt.Fprintf(&b, "%s%.1f %.1f", command, xOf(at.Seconds()*1000), yOf(part))
	}
	return b.String()
}

func xOf(ms float64) float64 {
	part := math.Log(min(max(ms, axisFrom), axisTo)/axisFrom) / math.Log(axisTo/axisFrom)
	return left + part*(width-left-right)
}

func yOf(part float64) float64 { return height - foot - part*(height-foot-top) }
