package pgxtenant

// segment is one stretch of the caller's messages that the server answers with a ReadyForQuery: a
// simple query, or extended-protocol messages up to a Sync. Several may be in flight.
type segment struct {
	simple  bool
	split   []int // of a simple query sent as extended messages: where its statements begin, in characters
	closed  bool  // its Query or Sync has been sent
	control bool  // it may begin or end a transaction
	failed  bool  // the server answered with an error

	sent int // messages of the caller's that will each be concluded by one reply; see concludes
	done int // how many have been

	// State of the command being answered, to tell SELECT from SELECT INTO; see leavingsOfTag.
	rows          int64
	describedRows bool // RowDescription came: always before the rows of a simple query
	describedNone bool // NoData came: on request, in the extended protocol

	inserts []insert
	next    int // first insert not yet answered
}

// insert is what was put between the caller's messages: a binding, with what had to go before it.
type insert struct {
	at       int      // how many of the caller's replies come before its own
	left     int      // how many of its replies are outstanding
	begun    bool     // the server has begun to reply
	prepares uint64   // statements that exist once it has completed
	cleans   leavings // what the session is rid of once it has committed
	start    int      // simple protocol: where in the text sent it begins, in characters
	chars    int      // and how long it is
	tenant   *binding // for error messages
}

// current returns the insert whose replies are being read, or nil.
func (s *segment) current() *insert {
	if s.next < len(s.inserts) && s.done == s.inserts[s.next].at {
		return &s.inserts[s.next]
	}
	return nil
}

// original maps an error position in the text that was sent to one in the caller's text, both counted
// in characters from 1. It reports false for a position inside an insert.
func (s *segment) original(position int) (int, bool) {
	shift := 0
	for _, in := range s.inserts {
		switch {
		case position > in.start+in.chars:
			shift += in.chars
		case position > in.start:
			return 0, false
		}
	}
	return position - shift, true
}

// splitMessages is how many messages each statement of a split segment is sent as.
const splitMessages = 4

// splitStart is where the statement being answered begins in a text that was split, in characters.
func (s *segment) splitStart() int { return s.split[min(s.done/splitMessages, len(s.split)-1)] }

// concludes reports whether a reply of type typ concludes one of the caller's messages.
func (s *segment) concludes(typ byte) bool {
	switch typ {
	case 'C', 'I': // CommandComplete, EmptyQueryResponse
		return true
	case '1', '2', '3', 'n', 'T', 's': // Parse-, Bind-, CloseComplete, NoData, RowDescription, PortalSuspended
		return !s.simple
	}
	return false
}

// segments is the queue of segments in flight, oldest first.
type segments struct {
	all  []segment
	head int
}

func (q *segments) len() int { return len(q.all) - q.head }

// first returns the segment being answered, or nil.
func (q *segments) first() *segment {
	if q.head == len(q.all) {
		return nil
	}
	return &q.all[q.head]
}

// last returns the segment being sent, or nil. It is valid until the next push.
func (q *segments) last() *segment {
	if q.head == len(q.all) {
		return nil
	}
	return &q.all[len(q.all)-1]
}

func (q *segments) push() *segment {
	if q.head > 32 && q.head > len(q.all)/2 {
		n := copy(q.all, q.all[q.head:])
		clear(q.all[n:]) // their slices now belong to the copies
		q.all, q.head = q.all[:n], 0
	}
	if n := len(q.all); n < cap(q.all) {
		q.all = q.all[:n+1]
		q.all[n] = segment{inserts: q.all[n].inserts[:0], split: q.all[n].split[:0]} // reuse the memory
	} else {
		q.all = append(q.all, segment{})
	}
	return &q.all[len(q.all)-1]
}

func (q *segments) pop() {
	q.head++
	if q.head == len(q.all) {
		q.all, q.head = q.all[:0], 0
	}
}
