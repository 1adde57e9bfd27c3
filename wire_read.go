package pgxtenant

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strconv"
)

// wireReader is the state of the reading side, guarded by wireConn.rmu.
type wireReader struct {
	out  []byte // processed, to be delivered first
	held []byte // the beginning of a message that must be whole to be looked at
	left int    // bytes left of the message being passed on or dropped
	drop bool   // which of the two
}

// maxHeld is the longest message that is held until it is whole. A longer error, which the server does
// not send, would be passed on as it comes, its position not corrected.
const maxHeld = 1 << 20

// Read reads what the server sends, without the replies to what was put in.
func (w *wireConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	w.rmu.Lock()
	n, err := w.read(p)
	w.rmu.Unlock()
	if w.waiting.Load() {
		w.mu.Lock()
		w.settled.Broadcast()
		w.mu.Unlock()
	}
	return n, err
}

func (w *wireConn) read(p []byte) (int, error) {
	r := &w.reader
	for {
		if len(r.out) > 0 {
			n := copy(p, r.out)
			if r.out = r.out[n:]; len(r.out) == 0 {
				r.out = nil
			}
			return n, nil
		}
		if len(p) <= len(r.held) { // no room for progress in the caller's buffer
			if err := w.readAhead(); err != nil && len(r.out) == 0 {
				return 0, err
			}
			continue
		}
		n, err := w.fill(p)
		if n > 0 || err != nil {
			return n, err
		}
	}
}

// readAhead reads once, for delivery later. rmu must be held.
func (w *wireConn) readAhead() error {
	r := &w.reader
	buf := make([]byte, len(r.held)+8192)
	before := r.out
	r.out = nil
	n, err := w.fill(buf)
	r.out = append(append(before, buf[:n]...), r.out...)
	return err
}

// fill reads once into buf, which has more room than what is held, and returns how many bytes of it are
// to be delivered: 0 if all were swallowed or held. More may be left in r.out.
func (w *wireConn) fill(buf []byte) (int, error) {
	r := &w.reader
	k := copy(buf, r.held)
	n, err := w.Conn.Read(buf[k:])
	r.held = r.held[:0]
	w.mu.Lock()
	n, spill, perr := w.receive(buf[:k+n])
	if perr != nil {
		err = w.breakOff(perr)
	}
	w.mu.Unlock()
	r.out = append(r.out, spill...)
	if err == io.EOF {
		r.out, r.held = append(r.out, r.held...), nil // the caller is to see what came, as without us
		if len(r.out) > 0 {
			err = nil // it comes again, behind that
		}
	}
	return n, err
}

// receive processes what the server sent, in place: the caller's share is moved to the front of buf, and
// its length returned. A message that grew in rewriting, and all behind it, is returned as spill.
// rmu and mu must be held.
func (w *wireConn) receive(buf []byte) (n int, spill []byte, err error) {
	r := &w.reader
	at := 0
	for at < len(buf) {
		if r.left > 0 {
			k := min(r.left, len(buf)-at)
			if !r.drop {
				if n != at {
					copy(buf[n:], buf[at:at+k])
				}
				n += k
			}
			at += k
			r.left -= k
			continue
		}
		msg := buf[at:]
		if len(msg) < 5 {
			r.held = append(r.held, msg...)
			return n, nil, nil
		}
		size, err := frameLen(msg)
		if err != nil {
			return n, nil, err
		}
		var body []byte
		switch msg[0] {
		case 'C', 'Z', 'E', 'N', 'S':
			if size > maxHeld {
				break
			}
			if len(msg) < size {
				r.held = append(r.held, msg...)
				return n, nil, nil
			}
			body = msg[5:size]
		}
		keep, rewritten, err := w.reply(msg[0], body)
		if err != nil {
			return n, nil, err
		}
		switch {
		case rewritten == nil:
			r.left, r.drop = size, !keep
		case len(rewritten) <= size:
			n += copy(buf[n:], rewritten)
			at += size
		default:
			rest := slices.Clone(buf[at+size:])
			m, more, err := w.receive(rest)
			return n, slices.Concat(rewritten, rest[:m], more), err
		}
	}
	return n, nil, nil
}

// reply takes note of one message of the server's and tells whether to keep it for the caller, perhaps
// rewritten. body is set for the types that are looked at.
func (w *wireConn) reply(typ byte, body []byte) (keep bool, rewritten []byte, err error) {
	s := w.inFlight.first()
	switch typ {
	case 'A': // NotificationResponse
		if w.stale != 0 {
			return false, nil, nil // an earlier tenant listens
		}
		w.dirty |= leavesForGood // pgx keeps those that nobody waits for
		return true, nil, nil
	case 'S': // ParameterStatus
		if name, rest, ok := cString(body); ok && string(name) == "standard_conforming_strings" {
			w.escapes = bytes.HasPrefix(rest, []byte("off"))
		}
		return true, nil, nil
	case 'N', 'E': // NoticeResponse, ErrorResponse
		return w.replyDiagnostic(s, typ, body)
	case 'Z': // ReadyForQuery
		if len(body) != 1 {
			return false, nil, errMalformed(typ)
		}
		return true, nil, w.replyReady(s, body[0])
	}
	if s == nil {
		if !w.ready {
			return true, nil, nil
		}
		return false, nil, fmt.Errorf("pgxtenant: lost track of the protocol: message %q with nothing in flight", typ)
	}
	if in := s.current(); in != nil {
		in.begun = true
		if s.concludes(typ) {
			if in.left--; in.left == 0 {
				w.prepared |= in.prepares
				w.cleaned |= in.cleans
				s.next++
			}
		}
		return false, nil, nil
	}
	keep = true
	switch typ {
	case '1', '2': // ParseComplete, BindComplete
		keep = len(s.split) == 0
	case 'D': // DataRow
		s.rows++
	case 'T': // RowDescription
		s.describedRows = true
	case 'n': // NoData
		s.describedNone = true
		keep = len(s.split) == 0
	case 'C': // CommandComplete
		w.complete(s, bytes.TrimSuffix(body, []byte{0}))
	case 'G': // CopyInResponse
		if !s.simple && s.closed {
			// The server ignores a Sync while it copies in: another will end the segment.
			if s != w.inFlight.last() {
				return false, nil, fmt.Errorf("pgxtenant: COPY FROM STDIN with more of the pipeline behind it")
			}
			s.closed, w.open = false, true
		}
	}
	if s.concludes(typ) {
		s.done++
		if typ == 'C' || typ == 'I' || typ == 's' {
			s.rows, s.describedRows, s.describedNone = 0, false, false
		}
	}
	return keep, nil, nil
}

// complete takes note of a command of the caller's that has completed.
func (w *wireConn) complete(s *segment, tag []byte) {
	switch {
	case string(tag) == "COMMIT":
		w.stale &^= w.cleaned
		w.cleaned = 0
	case string(tag) == "ROLLBACK" && s.control: // not only to a savepoint; it brings back what was cleaned away
		w.cleaned = 0
	}
	if forgetsStatements(tag) {
		w.prepared = 0
	}
	none := s.describedNone && s.rows == 0
	if s.simple {
		none = !s.describedRows
	}
	w.dirty |= leavingsOfTag(tag, s.rows, none)
}

// replyReady ends the first segment, whose transaction status is now known.
func (w *wireConn) replyReady(s *segment, status byte) error {
	w.status = status
	if !w.ready {
		w.ready = true
		return nil
	}
	if s == nil || !s.closed {
		return fmt.Errorf("pgxtenant: lost track of the protocol: ReadyForQuery with nothing in flight")
	}
	if status == 'I' {
		if !s.failed { // otherwise it was rolled back
			w.stale &^= w.cleaned
		}
		w.cleaned = 0
		if len(w.portals) > 0 && w.inFlight.len() == 1 {
			clear(w.portals)
		}
	}
	if s.control {
		w.controls--
	}
	w.inFlight.pop()
	return nil
}

// replyDiagnostic handles errors and notices.
func (w *wireConn) replyDiagnostic(s *segment, typ byte, body []byte) (keep bool, rewritten []byte, err error) {
	if s == nil {
		return true, nil, nil // from outside any query, such as a shutdown
	}
	in := s.current()
	if typ == 'N' {
		if in != nil {
			return false, nil, nil
		}
		return true, w.reposition(s, typ, body), nil
	}
	s.failed = true
	s.next = len(s.inserts) // the server skips what follows
	// A simple query is parsed as a whole before any of it is run: the error may be in the caller's text.
	if in == nil || s.simple && !in.begun {
		if code := string(diagnosticField(body, 'C')); len(s.inserts) > 0 && (code == "25001" || code == "2D000") {
			// VACUUM, CREATE DATABASE, CREATE INDEX CONCURRENTLY and their like, which run alone; and a
			// procedure that commits.
			return true, withHint(body, "pgxtenant sends every statement in one transaction with its tenant's binding; run this one on the admin pool"), nil
		}
		return true, w.reposition(s, typ, body), nil
	}
	if in != nil && in.cleans != 0 {
		w.doomed = true // what could not be cleaned must not wait for the next tenant
	}
	w.prepared &^= in.prepares
	if code := diagnosticField(body, 'C'); string(code) == "26000" {
		w.prepared = 0 // someone deallocated our statement: it is prepared anew next time
	}
	return true, rewriteDiagnostic(typ, body, func(field byte, value []byte) ([]byte, bool) {
		switch {
		case field == 'P':
			return nil, false // a position in text the caller has not written
		case field == 'M' && string(diagnosticField(body, 'V')) == "ERROR":
			return fmt.Appendf(nil, "pgxtenant: binding tenant %q: %s", in.tenant.tenant.ID, value), true
		}
		return value, true
	}), nil
}

// reposition corrects the position in an error or notice of a simple query for the text put in.
func (w *wireConn) reposition(s *segment, typ byte, body []byte) []byte {
	split := len(s.split) > 0
	if !split && (!s.simple || len(s.inserts) == 0) {
		return nil
	}
	position, err := strconv.Atoi(string(diagnosticField(body, 'P')))
	if err != nil {
		return nil // has none
	}
	return rewriteDiagnostic(typ, body, func(field byte, value []byte) ([]byte, bool) {
		if field != 'P' {
			return value, true
		}
		if split {
			return strconv.AppendInt(nil, int64(position+s.splitStart()), 10), true
		}
		position, ok := s.original(position)
		return strconv.AppendInt(nil, int64(position), 10), ok
	})
}

// withHint returns an ErrorResponse with a hint, unless it has one.
func withHint(body []byte, hint string) []byte {
	if diagnosticField(body, 'H') != nil {
		return nil
	}
	fields := bytes.TrimRight(body, "\x00") // of the last field, and of the message
	return rewriteDiagnostic('E', slices.Concat(fields, []byte("\x00H"+hint+"\x00\x00")), func(_ byte, value []byte) ([]byte, bool) { return value, true })
}

// diagnosticField returns a field of an ErrorResponse or NoticeResponse, or nil.
func diagnosticField(body []byte, field byte) []byte {
	for len(body) > 0 && body[0] != 0 {
		value, rest, ok := cString(body[1:])
		if !ok {
			return nil
		}
		if body[0] == field {
			return value
		}
		body = rest
	}
	return nil
}

// rewriteDiagnostic returns a message with each field replaced, or left out, by f.
func rewriteDiagnostic(typ byte, body []byte, f func(field byte, value []byte) ([]byte, bool)) []byte {
	out := append(make([]byte, 0, len(body)+64), typ, 0, 0, 0, 0)
	for len(body) > 0 && body[0] != 0 {
		value, rest, ok := cString(body[1:])
		if !ok {
			break
		}
		if v, keep := f(body[0], value); keep {
			out = append(append(append(out, body[0]), v...), 0)
		}
		body = rest
	}
	out = append(out, 0)
	binary.BigEndian.PutUint32(out[1:], uint32(len(out)-1))
	return out
}
