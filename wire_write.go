package pgxtenant

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
	"unsafe"
)

// wireWriter is the state of the writing side.
type wireWriter struct {
	buf     []byte // reused for messages with an insert
	pending []byte // the beginning of a message whose end is yet to be written
	pass    int    // bytes left of a CopyData message that is passed on as it comes
}

const (
	smallWrite = 16 << 10 // up to this much is copied, so that it leaves in one packet with its prefix
	keepBuffer = 64 << 10 // a larger buffer is given back after use
)

// The refusals of what cannot be bound; pgx itself never sends it.
var (
	errMixed  = fmt.Errorf("%w: a simple query inside an extended-protocol segment without Sync", ErrUnbound)
	errPortal = fmt.Errorf("%w: the unnamed portal, which the binding needs, is yet to be executed", ErrUnbound)
)

// Write sends p, with bindings put in where they belong. pgx writes whole messages; others may split
// them anywhere. If it fails, n is 0 only if no byte of the caller's has been sent.
func (w *wireConn) Write(p []byte) (n int, err error) {
	ww := &w.writer
	w.mu.Lock()
	if !w.ready {
		w.mu.Unlock()
		return w.Conn.Write(p)
	}
	data := p
	if len(ww.pending) > 0 {
		ww.pending = append(ww.pending, p...)
		data = ww.pending
	}
	e := edit{data: data, out: ww.buf[:0]}
	at, err := w.sendWhole(&e)
	if err != nil {
		w.breakOff(err)
	}
	w.mu.Unlock()
	if err == nil {
		err = e.flush(w.Conn, at)
	}
	if ww.buf = e.out[:0]; cap(ww.buf) > keepBuffer {
		ww.buf = nil
	}
	if err != nil {
		if e.sent == 0 {
			return 0, err
		}
		return min(e.sent, max(len(p)-1, 0)), err
	}
	if ww.pending = append(ww.pending[:0], data[at:]...); len(ww.pending) == 0 && cap(ww.pending) > keepBuffer {
		ww.pending = nil
	}
	return len(p), nil
}

// sendWhole handles the whole messages of e.data and returns where the rest begins, which is yet to be completed.
// mu must be held; it is given up while the server is waited for.
func (w *wireConn) sendWhole(e *edit) (at int, err error) {
	ww, data := &w.writer, e.data
	for err = w.broken; err == nil && at < len(data); {
		if ww.pass > 0 {
			n := min(ww.pass, len(data)-at)
			ww.pass -= n
			at += n
			continue
		}
		if len(data)-at < 5 {
			return at, nil
		}
		size, err := frameLen(data[at:])
		if err != nil {
			return at, err
		}
		if data[at] == 'd' { // CopyData needs no look inside
			ww.pass = size
			continue
		}
		if len(data)-at < size {
			return at, nil
		}
		if w.mustSettle(data[at]) {
			w.mu.Unlock()
			if err = e.flush(w.Conn, at); err == nil {
				err = w.settle()
			}
			w.mu.Lock()
			if err != nil {
				return at, err
			}
		}
		if err = w.send(e, at, data[at:at+size]); err != nil {
			return at, err
		}
		at += size
	}
	return at, err
}

// mustSettle reports whether a message of type typ can only be handled once the server has answered
// what is in flight: it begins a segment, and what the transaction's status will be then is not known.
// Only pipelines with transaction commands between their Syncs come here.
func (w *wireConn) mustSettle(typ byte) bool {
	if w.open || w.current == nil || w.inFlight.len() == 0 {
		return false
	}
	switch typ {
	case 'Q', 'P', 'B', 'C', 'D', 'E':
		return w.controls > 0 || w.need && w.status == 'T'
	}
	return false
}

// send handles one whole message of the caller's, which begins at data[at]. mu must be held.
func (w *wireConn) send(e *edit, at int, msg []byte) error {
	body := msg[5:]
	switch msg[0] {
	case 'Q':
		return w.sendQuery(e, at, body)
	case 'P', 'B', 'C', 'D', 'E':
		if !w.open {
			w.begin().simple = false
			w.open = true
		}
		if err := w.sendExtended(e, at, msg[0], body); err != nil {
			return err
		}
		w.inFlight.last().sent++
	case 'S':
		if !w.open {
			w.begin()
		}
		w.inFlight.last().closed = true
		w.open = false
	case 'F':
		return fmt.Errorf("%w: the function call protocol", ErrUnbound)
	}
	return nil // Flush, CopyDone, CopyFail, Terminate
}

// begin starts a segment and decides whether its first ordinary statement needs a binding. In a
// transaction that is open and bound none is needed; in a failed one it would swallow the ROLLBACK.
func (w *wireConn) begin() *segment {
	switch {
	case w.status == 'I':
		w.unnamed = false
		w.need = true // also behind others in flight: they do not change the status, or we had settled
	case w.status == 'E' && w.inFlight.len() == 0:
		w.need = false
	}
	return w.inFlight.push()
}

// sendExtended handles a message of the extended protocol. A prepared statement is parsed and described
// under the binding too, since its names are looked up then.
func (w *wireConn) sendExtended(e *edit, at int, typ byte, body []byte) error {
	class, ok := w.note(typ, body)
	if !ok {
		return errMalformed(typ)
	}
	if class == ordinary && w.need && w.current != nil {
		if w.unnamed {
			return errPortal
		}
		e.copyTo(at)
		e.out = w.appendPrefix(e.out, w.inFlight.last())
	}
	if typ == 'B' && body[0] == 0 {
		w.unnamed = true
	}
	return nil
}

// note takes note of the statements and portals that a message makes, runs or closes, and returns the class of the
// statement that the server looks at for it, blank if it does at none. It reports false if the message is malformed.
func (w *wireConn) note(typ byte, body []byte) (class, bool) {
	switch typ {
	case 'P':
		return w.noteParse(body)
	case 'B':
		return w.noteBind(body)
	case 'E':
		return blank, w.noteExecute(body)
	case 'D':
		if len(body) == 0 || body[0] != 'S' {
			return blank, true
		}
		name, _, ok := cString(body[1:])
		return w.statements[string(name)].class, ok
	case 'C':
		if name, _, ok := cString(body[min(1, len(body)):]); ok && body[0] == 'S' && len(w.statements) > 0 {
			delete(w.statements, string(name))
		} else if ok && body[0] == 'P' && len(name) == 0 {
			w.unnamed = false
		}
	}
	return blank, true
}

func (w *wireConn) noteParse(body []byte) (class, bool) {
	name, rest, ok1 := cString(body)
	query, _, ok2 := cString(rest)
	if !ok1 || !ok2 {
		return blank, false
	}
	text := view(query)
	var info statementInfo
	info.class, _ = classify(text, w.escapes)
	info.leavings = leavingsOfText(text)
	if info != (statementInfo{}) {
		w.statements[string(name)] = info
	} else if len(w.statements) > 0 {
		delete(w.statements, string(name))
	}
	return info.class, true
}

func (w *wireConn) noteBind(body []byte) (class, bool) {
	portal, rest, ok1 := cString(body)
	name, _, ok2 := cString(rest)
	if !ok1 || !ok2 {
		return blank, false
	}
	info := w.statements[string(name)]
	w.dirty |= info.leavings
	if len(portal) == 0 {
		w.unnamed = false
	}
	if info.class != ordinary {
		w.portals[string(portal)] = info.class
	} else if len(portal) == 0 && len(w.portals) > 0 {
		delete(w.portals, "") // a named one stays what it is until the transaction ends
	}
	return info.class, true
}

func (w *wireConn) noteExecute(body []byte) bool {
	portal, _, ok := cString(body)
	if !ok {
		return false
	}
	class := w.portals[string(portal)]
	// In a failed transaction nothing ordinary can be executed.
	if class == control || class == ordinary && w.status == 'E' {
		w.need = true
		w.mark(w.inFlight.last())
	}
	if len(portal) == 0 {
		w.unnamed = false
	}
	return true
}

// mark notes that s may begin or end a transaction.
func (w *wireConn) mark(s *segment) {
	if !s.control {
		s.control = true
		w.controls++
	}
}

// appendPrefix appends the binding, behind the removal of what an earlier tenant left.
func (w *wireConn) appendPrefix(dst []byte, s *segment) []byte {
	in := insert{at: s.sent}
	add := func(prepare, execute []byte, bit uint64) {
		if w.prepared&bit == 0 || !w.keepsPrepared {
			dst = append(dst, prepare...)
			in.left += 2 // CloseComplete, ParseComplete
			in.prepares |= bit
		}
		dst = append(dst, execute...)
		in.left += 2 // BindComplete, CommandComplete
	}
	if in.cleans = w.stale &^ w.cleaned; in.cleans != 0 {
		for i := range cleanings {
			if c := &cleanings[i]; c.leavings&in.cleans != 0 {
				add(c.prepare, c.execute, c.bit)
			}
		}
	}
	w.current = w.current.fresh()
	b := w.current
	in.tenant = b
	add(b.shape.prepare, b.exec, b.shape.bit)
	s.inserts = append(s.inserts, in)
	w.need = false
	w.meter.bound.Add(1)
	return dst
}

// sendQuery handles a simple query. Its binding goes into its own text: as messages in front of it, a
// binding that fails would make the server skip to a Sync that never comes.
func (w *wireConn) sendQuery(e *edit, at int, body []byte) error {
	if w.open {
		return errMixed
	}
	query, rest, ok := cString(body)
	if !ok || len(rest) > 0 {
		return errMalformed('Q')
	}
	text := view(query)
	s := w.begin()
	s.simple, s.closed = true, true

	first, several := classify(text, w.escapes)
	if first == blank {
		return nil // must be answered by EmptyQueryResponse, and runs nothing
	}
	w.dirty |= leavingsOfText(text)
	if w.current != nil && w.current.sealed() && w.sendSplit(e, at, text, s) {
		return nil
	}
	var room [1]int // without an allocation for one statement
	offsets := room[:0]
	if !several {
		if w.bindsBefore(s, first, 0) {
			offsets = append(offsets, 0)
		}
	} else {
		l := lexer{text: text, escapes: w.escapes}
		for n := 0; ; n++ {
			st, ok := l.next()
			if !ok {
				break
			}
			if w.bindsBefore(s, st.class, n) {
				offsets = append(offsets, st.start)
			}
		}
	}
	if len(offsets) > 0 {
		w.appendQuery(e, at, text, s, offsets)
		// It has no signature, for its text can be seen: what comes next in the transaction gets one.
		w.need = w.need || w.current.sealed()
	}
	return nil
}

// bindsBefore reports whether the binding goes into the text of s before its nth statement, and takes note of it.
func (w *wireConn) bindsBefore(s *segment, c class, n int) bool {
	switch {
	case c == control:
		w.need = true
		w.mark(s)
	case c == ordinary && w.need && w.current != nil:
		s.inserts = append(s.inserts, insert{at: n})
		w.need = false
		return true
	}
	return false
}

// sendSplit sends a simple query as messages of the extended protocol, statement by statement up to one
// Sync, so that the binding can go before them and not into the text. For the server the two are the same
// transaction; the replies that a simple query has not are swallowed. It reports false for a text that can
// stay as it is, since it needs no binding, or must, since rows are to be copied in behind it.
func (w *wireConn) sendSplit(e *edit, at int, text string, s *segment) bool {
	need := w.need
	bound := false
	l := lexer{text: text, escapes: w.escapes}
	for {
		st, ok := l.next()
		if !ok {
			break
		}
		if st.copyIn {
			return false
		}
		need = need || st.class == control
		bound = bound || need && st.class == ordinary
	}
	if !bound {
		return false
	}
	s.simple = false
	s.split = s.split[:0]
	e.copyTo(at)
	done, chars := 0, 0
	l = lexer{text: text, escapes: w.escapes}
	for {
		st, ok := l.next()
		if !ok {
			break
		}
		switch {
		case st.class == control:
			w.need = true
			w.mark(s)
		case st.class == ordinary && w.need:
			e.out = w.appendPrefix(e.out, s)
		}
		chars += utf8.RuneCountInString(text[done:st.start])
		done = st.start
		s.split = append(s.split, chars)
		e.out = appendStatement(e.out, text[st.start:st.end])
		s.sent += splitMessages
	}
	e.out = append(e.out, 'S', 0, 0, 0, 4)
	e.skipTo(at + 5 + len(text) + 1)
	return true
}

// appendQuery replaces the Query message at data[at] by one whose text has a binding at each offset.
func (w *wireConn) appendQuery(e *edit, at int, text string, s *segment, offsets []int) {
	w.meter.bound.Add(int64(len(offsets)))
	clean, replies := "", 1
	cleans := w.stale &^ w.cleaned
	if cleans != 0 {
		var sb strings.Builder
		for i := range cleanings {
			if c := &cleanings[i]; c.leavings&cleans != 0 {
				sb.WriteString(c.sql + ";")
				replies++
			}
		}
		clean = sb.String()
	}
	binding := w.current.query()
	added := len(clean) + len(binding)
	chars := len(clean) + utf8.RuneCountInString(binding)

	e.copyTo(at)
	e.out = append(e.out, 'Q')
	e.out = binary.BigEndian.AppendUint32(e.out, uint32(4+len(text)+1+added*len(offsets)))
	done, start := 0, 0
	for i, off := range offsets {
		e.out = append(e.out, text[done:off]...)
		e.out = append(e.out, clean...)
		e.out = append(e.out, binding...)
		start += utf8.RuneCountInString(text[done:off])
		done = off
		in := &s.inserts[i]
		in.left, in.cleans, in.tenant = replies, cleans, w.current
		in.start, in.chars = start, chars
		start += chars
	}
	e.skipTo(at + 5 + done) // the rest of the text is passed on with what follows
}

// edit turns what the caller wrote into what is sent.
type edit struct {
	data []byte
	next int    // first byte of data neither sent nor in out
	out  []byte // to be sent before data[next:]
	sent int    // bytes of data, or stretches of it, that have been sent
}

// copyTo moves data up to end into out.
func (e *edit) copyTo(end int) {
	e.out = append(e.out, e.data[e.next:end]...)
	e.next = end
}

// skipTo leaves data up to end out.
func (e *edit) skipTo(end int) { e.next = end }

// flush sends everything up to end.
func (e *edit) flush(conn interface{ Write([]byte) (int, error) }, end int) error {
	if len(e.out) > 0 && end-e.next <= smallWrite {
		e.copyTo(end)
	}
	for _, b := range [2][]byte{e.out, e.data[e.next:end]} {
		if len(b) == 0 {
			continue
		}
		n, err := conn.Write(b)
		e.sent += n
		if err != nil {
			return err
		}
	}
	e.out, e.next = e.out[:0], end
	return nil
}

// settle waits until the server has answered everything in flight, reading on behalf of the reader if
// there is none just now.
func (w *wireConn) settle() error {
	w.waiting.Store(true)
	defer w.waiting.Store(false)
	for {
		if w.rmu.TryLock() {
			err := w.readAhead()
			w.rmu.Unlock()
			if err != nil {
				return err
			}
		}
		w.mu.Lock()
		reading := !w.rmu.TryLock()
		if !reading {
			w.rmu.Unlock()
		}
		for reading && w.inFlight.len() > 0 && w.broken == nil && !w.closed {
			w.settled.Wait()
			reading = false // look again
		}
		done, err := w.inFlight.len() == 0, w.broken
		if err == nil && w.closed {
			err = errors.New("pgxtenant: connection closed while waiting for the server")
		}
		w.mu.Unlock()
		if done || err != nil {
			return err
		}
	}
}

func errMalformed(typ byte) error {
	return fmt.Errorf("pgxtenant: malformed message of type %q", typ)
}

// view returns b as a string without copying; it must not outlive b.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }
