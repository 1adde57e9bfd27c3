package pgxtenant

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
)

// FuzzWire plays random messages, written and read in random pieces, to a small model of the server,
// once through a wireConn and once without. Through it, every ordinary statement must run as the
// tenant; and the caller must get, to the byte, what it would get without.
func FuzzWire(f *testing.F) {
	f.Add([]byte{0x00, 0x10, 0x20, 0x30, 0x40, 0x01, 0x11, 0x20, 0x30}, []byte{1, 5, 200, 3})
	f.Add([]byte("\x60\x61\x62\x63\x64\x65\x66\x67\x68\x69\x30\x60"), []byte{0})
	f.Add([]byte("\x01\x11\x21\x30\x00\x10\x20\x30\x02\x12\x22\x30\x30\x30\x00\x10\x20\x30"), []byte{7, 7, 7, 0, 9})
	f.Fuzz(func(t *testing.T, script, cuts []byte) {
		messages := fuzzMessages(script)
		plain, _, _ := play(t, messages, cuts, false)
		bound, server, refused := play(t, messages, cuts, true)
		for _, ran := range server.ran {
			if ran.tenant != "t1" {
				t.Fatalf("%q ran as %q in\n%s", ran.sql, ran.tenant, describe(messages))
			}
		}
		if !bytes.Equal(plain, bound) && !(refused && bytes.HasPrefix(plain, bound)) {
			t.Fatalf("the caller gets\n%q, without the binding\n%q\nof\n%s", bound, plain, describe(messages))
		}
	})
}

func describe(messages []pgproto3.FrontendMessage) string {
	var sb strings.Builder
	for _, m := range messages {
		fmt.Fprintf(&sb, "%T%+v\n", m, m)
	}
	return sb.String()
}

var fuzzTexts = []string{
	"select 1", "begin", "commit", "rollback", "fail", "set transaction read only", "", "savepoint s", "select 2", "start transaction", "rollback to s",
}

// fuzzMessages makes messages of a script, one a byte, so that a simple query comes after a Sync. The
// unnamed portal is executed once, right after it was bound: it is also the binding's.
func fuzzMessages(script []byte) (messages []pgproto3.FrontendMessage) {
	names := []string{"", "p", "q"}
	open, unnamed := false, false
	for _, b := range script {
		arg := int(b & 0x0f)
		text := fuzzTexts[arg%len(fuzzTexts)]
		name := names[arg%len(names)]
		var m pgproto3.FrontendMessage
		switch b >> 4 % 10 {
		case 0:
			m = &pgproto3.Parse{Name: name, Query: text}
		case 1:
			m = &pgproto3.Bind{DestinationPortal: name, PreparedStatement: name}
			unnamed = name == ""
		case 2:
			if name == "" && !unnamed {
				continue
			}
			m = &pgproto3.Execute{Portal: name}
		case 3:
			m = &pgproto3.Sync{}
		case 4:
			if arg&1 == 1 && name == "" && !unnamed {
				continue
			}
			m = &pgproto3.Describe{ObjectType: "SP"[arg&1], Name: name}
		case 5:
			m = &pgproto3.Close{ObjectType: "SP"[arg&1], Name: name}
		case 6, 7:
			if open {
				messages = append(messages, &pgproto3.Sync{})
			}
			m = &pgproto3.Query{String: text + ";" + fuzzTexts[(arg*7+3)%len(fuzzTexts)]}
			if b>>4 == 6 {
				m = &pgproto3.Query{String: text}
			}
			open = false
		case 8: // the usual: parse, bind, execute, sync
			messages = append(messages, &pgproto3.Parse{Query: text}, &pgproto3.Bind{}, &pgproto3.Execute{})
			m = &pgproto3.Sync{}
		default:
			m = &pgproto3.Flush{}
		}
		switch m.(type) {
		case *pgproto3.Sync:
			open = false
		case *pgproto3.Parse, *pgproto3.Bind, *pgproto3.Execute, *pgproto3.Describe, *pgproto3.Close:
			open = true
		}
		if _, ok := m.(*pgproto3.Bind); !ok {
			unnamed = false
		}
		messages = append(messages, m)
	}
	if open {
		messages = append(messages, &pgproto3.Sync{})
	}
	return messages
}

// play writes messages in pieces, reading in between, and returns all that was read. It stops where a message is
// refused, as one that cannot be bound may be.
func play(t *testing.T, messages []pgproto3.FrontendMessage, cuts []byte, bind bool) (got []byte, server *modelServer, refused bool) {
	server = &modelServer{statements: map[string]string{}, portals: map[string]string{}, status: 'I'}
	server.reply(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	var conn net.Conn = server
	if bind {
		b, err := newBinder(binderOptions{})
		require.NoError(t, err)
		w := newWireConn(server, true, false)
		bd, err := b.bind(nil, &Tenant{ID: "t1"})
		require.NoError(t, err)
		conn = w
		_, err = io.ReadFull(conn, make([]byte, 6))
		require.NoError(t, err)
		ok, err := w.assign(bd)
		require.True(t, ok)
		require.NoError(t, err)
	} else {
		_, err := io.ReadFull(conn, make([]byte, 6))
		require.NoError(t, err)
	}
	cut := func(i int) int {
		if len(cuts) == 0 {
			return 1 << 20
		}
		return int(cuts[i%len(cuts)])
	}
	var all []byte
	for _, m := range messages {
		b, err := m.Encode(nil)
		require.NoError(t, err)
		all = append(all, b...)
	}
	read := func(size int) {
		for {
			server.most = size%7 + 1
			p := make([]byte, size%50+1)
			n, err := conn.Read(p)
			got = append(got, p[:n]...)
			if err != nil {
				require.ErrorIs(t, err, os.ErrDeadlineExceeded)
				return
			}
		}
	}
	for i := 0; len(all) > 0; i++ {
		n := min(cut(i)+1, len(all))
		wrote, err := conn.Write(all[:n])
		if bind && errors.Is(err, errPortal) {
			return got, server, true
		}
		require.NoError(t, err)
		require.Equal(t, n, wrote)
		all = all[n:]
		if cut(i+1)%3 == 0 {
			read(cut(i))
		}
	}
	read(100)
	return got, server, false
}

// modelServer answers as the server would, as far as transactions, segments and local settings go.
type modelServer struct {
	net.Conn // nil: what is not written below is not called

	in, out    []byte
	most       int
	statements map[string]string
	portals    map[string]string
	status     byte // between segments, and in them once a BEGIN has run
	skip       bool
	savepoint  bool // the transaction has one
	tenant     string
	ran        []ranStatement
}

type ranStatement struct{ sql, tenant string }

func (s *modelServer) Read(p []byte) (int, error) {
	if len(s.out) == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	n := copy(p[:min(len(p), max(s.most, 1))], s.out)
	s.out = s.out[n:]
	return n, nil
}

func (s *modelServer) Write(p []byte) (int, error) {
	s.in = append(s.in, p...)
	for len(s.in) >= 5 {
		size := 1 + int(binary.BigEndian.Uint32(s.in[1:]))
		if len(s.in) < size {
			break
		}
		s.handle(s.in[0], s.in[5:size])
		s.in = s.in[size:]
	}
	return len(p), nil
}

func (s *modelServer) reply(m pgproto3.BackendMessage) {
	out, err := m.Encode(s.out)
	if err != nil {
		panic(err)
	}
	s.out = out
}

func (s *modelServer) handle(typ byte, body []byte) {
	if s.skip && typ != 'S' {
		return
	}
	switch typ {
	case 'P':
		var m pgproto3.Parse
		if err := m.Decode(body); err != nil {
			panic(err)
		}
		_, exists := s.statements[m.Name]
		switch {
		case m.Query == "fail":
			s.fail("42601")
		case exists && m.Name != "":
			s.fail("42P05")
		case s.status == 'E' && !mayEnd(m.Query):
			s.fail("25P02")
		default:
			s.statements[m.Name] = m.Query
			s.reply(&pgproto3.ParseComplete{})
		}
	case 'B':
		var m pgproto3.Bind
		if err := m.Decode(body); err != nil {
			panic(err)
		}
		sql, ok := s.statements[m.PreparedStatement]
		_, taken := s.portals[m.DestinationPortal]
		switch {
		case !ok:
			s.fail("26000")
		case taken && m.DestinationPortal != "":
			s.fail("42P03")
		case s.status == 'E' && !mayEnd(sql):
			s.fail("25P02")
		default:
			if len(m.Parameters) > 0 {
				sql += "=" + string(m.Parameters[0])
			}
			s.portals[m.DestinationPortal] = sql
			s.reply(&pgproto3.BindComplete{})
		}
	case 'D':
		from := s.statements
		if body[0] == 'P' {
			from = s.portals
		}
		sql, ok := from[string(body[1:len(body)-1])]
		switch {
		case !ok:
			s.fail("26000")
		default:
			if body[0] == 'S' {
				s.reply(&pgproto3.ParameterDescription{})
			}
			if strings.HasPrefix(sql, "select") {
				s.reply(&pgproto3.RowDescription{Fields: []pgproto3.FieldDescription{{Name: []byte("f")}}})
			} else {
				s.reply(&pgproto3.NoData{})
			}
		}
	case 'C':
		from := s.statements
		if body[0] == 'P' {
			from = s.portals
		}
		delete(from, string(body[1:len(body)-1]))
		s.reply(&pgproto3.CloseComplete{})
	case 'E':
		sql, ok := s.portals[string(body[:bytes.IndexByte(body, 0)])]
		if !ok {
			s.fail("34000")
			return
		}
		s.run(sql, false)
	case 'S':
		s.skip = false
		s.ready()
	case 'Q':
		text := string(body[:len(body)-1])
		ran := false
		for sql := range strings.SplitSeq(text, ";") {
			if sql == "" {
				continue
			}
			ran = true
			if !s.run(sql, true) {
				break
			}
		}
		if !ran {
			s.reply(&pgproto3.EmptyQueryResponse{})
		}
		s.skip = false
		s.ready()
	}
}

func (s *modelServer) ready() {
	if s.status == 'I' {
		s.end()
	}
	s.reply(&pgproto3.ReadyForQuery{TxStatus: s.status})
}

// end ends the transaction.
func (s *modelServer) end() {
	s.tenant, s.savepoint = "", false
	clear(s.portals)
}

func (s *modelServer) fail(code string) {
	s.reply(&pgproto3.ErrorResponse{Severity: "ERROR", Code: code, Message: "no"})
	s.skip = true
	if s.status != 'I' {
		s.status = 'E'
	} else {
		s.end()
	}
}

// mayEnd reports whether a failed transaction lets sql through.
func mayEnd(sql string) bool { return strings.HasPrefix(sql, "rollback") || sql == "commit" }

func (s *modelServer) run(sql string, simple bool) bool {
	if s.status == 'E' && !mayEnd(sql) {
		s.fail("25P02")
		return false
	}
	switch {
	case sql == "":
		s.reply(&pgproto3.EmptyQueryResponse{})
		return true
	case sql == "fail":
		s.ran = append(s.ran, ranStatement{sql, s.tenant})
		s.fail("22012")
		return false
	case sql == "begin", sql == "start transaction":
		s.status = 'T'
		s.reply(&pgproto3.CommandComplete{CommandTag: []byte("BEGIN")})
	case sql == "rollback to s":
		if s.status == 'I' || !s.savepoint {
			s.fail("3B001")
			return false
		}
		s.status = 'T'
		s.reply(&pgproto3.CommandComplete{CommandTag: []byte("ROLLBACK")})
	case sql == "commit", sql == "rollback":
		s.status = 'I'
		s.end()
		s.reply(&pgproto3.CommandComplete{CommandTag: []byte(strings.ToUpper(sql))})
	case strings.HasPrefix(sql, "set transaction"):
		s.reply(&pgproto3.CommandComplete{CommandTag: []byte("SET")})
	default:
		if strings.HasPrefix(sql, "select pg_catalog.set_config('app.current_tenant_id',") {
			_, s.tenant, _ = strings.Cut(strings.TrimPrefix(sql, "select pg_catalog.set_config('app.current_tenant_id',"), "=")
			if simple {
				s.tenant = strings.Split(sql, "'")[3]
			}
		} else {
			s.ran = append(s.ran, ranStatement{sql, s.tenant})
		}
		if !strings.HasPrefix(sql, "select") {
			s.savepoint = true
			s.reply(&pgproto3.CommandComplete{CommandTag: []byte("SAVEPOINT")})
			break
		}
		if simple {
			s.reply(&pgproto3.RowDescription{Fields: []pgproto3.FieldDescription{{Name: []byte("f")}}})
		}
		s.reply(&pgproto3.DataRow{Values: [][]byte{[]byte("v")}})
		s.reply(&pgproto3.CommandComplete{CommandTag: []byte("SELECT 1")})
	}
	return true
}

// The same on the real server: everything pgx writes and reads is cut into small pieces, down to bytes.
func TestFramingInPieces(t *testing.T) {
	t.Parallel()
	db := docsDB(t)
	db.SuperExec("delete from docs", "insert into docs select 't'||t, n, 't'||t||':'||n from generate_series(0, 3) t, generate_series(1, 20) n")
	for _, piece := range []int{1, 2, 3, 7, 64} {
		inEveryMode(t, func(t *testing.T, m pgx.QueryExecMode) {
			pool := boundPool(t, db.AppURL(), mode(m), func(c *pgxpool.Config) {
				dial := c.ConnConfig.DialFunc
				c.ConnConfig.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
					conn, err := dial(ctx, network, addr)
					return &piecewise{conn, piece}, err
				}
				c.ConnConfig.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend {
					return pgproto3.NewFrontend(&pieces{r: r, n: piece}, &pieces{w: w, n: piece})
				}
			})
			for range 20 {
				for i := range 4 {
					if err := randomOperation(pool, fmt.Sprintf("t%d", i)); err != nil {
						t.Fatal(err)
					}
				}
			}
		})
	}
}

// pieces passes on at most n bytes at a time.
type pieces struct {
	r io.Reader
	w io.Writer
	n int
}

func (p *pieces) Read(b []byte) (int, error) { return p.r.Read(b[:min(len(b), p.n)]) }

func (p *pieces) Write(b []byte) (done int, err error) {
	for done < len(b) && err == nil {
		var n int
		n, err = p.w.Write(b[done:min(done+p.n, len(b))])
		done += n
	}
	return done, err
}

// piecewise is a net.Conn that reads at most n bytes at a time.
type piecewise struct {
	net.Conn
	n int
}

func (p *piecewise) Read(b []byte) (int, error) { return p.Conn.Read(b[:min(len(b), p.n)]) }

// A message with an impossible length, or one the binding cannot follow, breaks the connection off.
func TestMalformedMessages(t *testing.T) {
	t.Parallel()
	for _, msg := range [][]byte{
		{'Q', 0, 0, 0, 3}, {'P', 0, 0, 0, 5, 'x'}, {'B', 0, 0, 0, 5, 0}, {'Q', 0, 0, 0, 5, 'x'}, {'E', 0, 0, 0, 5, 'x'},
		{'D', 0, 0, 0, 6, 'S', 'x'}, {'F', 0, 0, 0, 4},
		{'P', 0, 0, 0, 8, 0, 0, 0, 0, 'Q', 0, 0, 0, 5, 0}, // a query before the Sync
	} {
		server := &modelServer{statements: map[string]string{}, portals: map[string]string{}, status: 'I'}
		server.reply(&pgproto3.ReadyForQuery{TxStatus: 'I'})
		b, err := newBinder(binderOptions{})
		require.NoError(t, err)
		w := newWireConn(server, true, false)
		_, err = io.ReadFull(w, make([]byte, 6))
		require.NoError(t, err)
		_, err = w.assign(b.without())
		require.NoError(t, err)
		_, err = w.Write(msg)
		require.Error(t, err, "%q", msg)
		_, again := w.Write([]byte{'S', 0, 0, 0, 4})
		require.Equal(t, err, again, "the connection is of no more use")
		ok, err := w.assign(b.without())
		require.False(t, ok)
		require.NoError(t, err)
	}
	// The same from the server's side.
	for _, msg := range [][]byte{{'Z', 0, 0, 0, 5, 'I'}, {'C', 0, 0, 0, 5, 0}, {'T', 0, 0, 0, 2}, {'Z', 0, 0, 0, 4}} {
		server := &modelServer{status: 'I'}
		server.reply(&pgproto3.ReadyForQuery{TxStatus: 'I'})
		w := newWireConn(server, true, false)
		_, err := io.ReadFull(w, make([]byte, 6))
		require.NoError(t, err)
		server.out = msg
		_, err = w.Read(make([]byte, 100))
		require.Error(t, err)
		require.False(t, errors.Is(err, os.ErrDeadlineExceeded))
	}
}
