package pgxtenant

import (
	"container/heap"
	"time"
)

// fairQueue decides whose checkout is next, for as long as any waits: start-time fair queueing over tenants
// (Goyal, Vin, Cheng: Start-time Fair Queueing, 1996), for several servers at once (Jin, Chase, Kaur:
// Interposed Proportional Sharing, 2004) and for costs that are known only afterwards, as in the
// API Priority and Fairness of Kubernetes: an estimate is charged when a connection is granted, and put right when it
// is returned.
//
// Each tenant has a tag, the virtual time at which its next checkout begins: connection time it has used,
// divided by its weight. The lowest tag is next. One that did not wait starts at the virtual time of now, which
// is the tag of the last one served, so that nothing can be saved up.
//
// It is not safe for concurrent use, takes the time from its caller, and counts no free connections.
type fairQueue struct {
	max   int // connections
	limit int // of one tenant, while others want some

	flows   map[string]*flow // by tenant ID: all that wait, hold, or have used more than their turn
	byTag   flowHeap         // those that wait and are not parked, and those that only have a tag ahead of virtual
	parked  []*flow          // those that wait, at their limit; never more than there are connections
	waiting int              // tickets
	active  int              // flows that wait or hold
	weight  float64          // of these together
	virtual float64
	usual   float64 // how long a connection is held, in seconds
	clock   int64   // to tell which of equal tags was first

	// The flow that last came or went, when, and when one other than it did. They outlast reset.
	lastSeen      string
	seen, seenOld time.Duration
}

// flow is one tenant in a fairQueue.
type flow struct {
	id     string
	weight float64
	tag    float64
	order  int64 // of those with the same tag
	index  int   // in byTag, or notQueued

	parked      bool
	held        int // connections, and grants that have not come to one yet
	n           int // tickets that wait
	first, last *ticket
	usual       float64       // how long it holds a connection, in seconds; 0 is unknown
	granted     time.Duration // when it was last granted one
	due         time.Duration // when the next one beyond its limit may be; 0 if there is no such
}

const notQueued = -1

// What a connection is thought to be held for before any was returned.
const usualAtFirst = 0.001

// recent is how long a tenant that has come or gone is thought to be about to come again. One that just holds
// a connection for longer, as a listener does, keeps nobody from the rest.
const recent = time.Second

// A tenant at its limit whom nobody else is in the way of takes what it may have of the rest bit by bit. Taken at once,
// connections would come back at once as well, and whoever comes next could find the pool taken for
// as long as one is held. Spread out, one comes back each part of that time.
const (
	spread     = 0.85                  // of an even spacing: less is more bunched, more holds the tenant itself back
	spreadMost = 10 * time.Millisecond // between two grants
)

func (f *flow) active() bool { return f.n > 0 || f.held > 0 }

func newFairQueue(max int, share float64) fairQueue {
	return fairQueue{max: max, limit: fairLimit(max, share), flows: make(map[string]*flow), seen: -recent, seenOld: -recent}
}

// fairLimit is how many of n connections a share of them is, at least one.
func fairLimit(n int, share float64) int { return max(1, int(share*float64(n)+1e-9)) }

// reset forgets everybody.
func (q *fairQueue) reset() {
	clear(q.byTag)
	clear(q.parked)
	clear(q.flows)
	if cap(q.byTag) > 4*q.max { // they do not shrink
		q.flows, q.byTag = make(map[string]*flow), nil
	}
	*q = fairQueue{max: q.max, limit: q.limit, flows: q.flows, byTag: q.byTag[:0], parked: q.parked[:0],
		lastSeen: q.lastSeen, seen: q.seen, seenOld: q.seenOld}
}

// push puts t at the end of its tenant's tickets.
func (q *fairQueue) push(t *ticket, id string, weight float64, now time.Duration) {
	f := q.flow(id)
	q.activate(f, weight)
	t.flow, t.prev, t.queued = f, f.last, true
	if f.last == nil {
		f.first = t
	} else {
		f.last.next = t
	}
	f.last = t
	f.n++
	q.waiting++
	q.see(f, now)
	if f.n == 1 && !f.parked {
		q.enter(f)
	}
}

// remove takes a ticket that has not been granted out again.
func (q *fairQueue) remove(t *ticket) {
	f := t.flow
	q.unlink(t)
	if f.n == 0 && f.parked {
		q.unpark(f)
	}
	if !f.active() {
		q.deactivate(f)
	}
	q.look() // nobody else may wait any more
}

// next takes out the ticket whose turn it is. If it returns none, though some wait, again is when to ask once
// more at the latest, unless a connection is returned before; 0 is never.
func (q *fairQueue) next(now time.Duration) (t *ticket, again time.Duration) {
	for len(q.byTag) > 0 {
		f := q.byTag[0]
		if f.n == 0 {
			q.catchUp(f)
			continue
		}
		if f.held >= q.limit {
			others := q.others(f)
			if q.waiting > f.n || q.active > 1 && now-others < recent {
				heap.Pop(&q.byTag)
				f.parked = true
				q.parked = append(q.parked, f)
				continue
			}
			if at := f.granted + q.spacing(f); now-others < recent && at > now {
				f.due = at
				return nil, at
			}
		}
		t := f.first
		q.unlink(t)
		f.held++
		f.granted = now
		if f.due != 0 { // a timer is late, and that shall not add up; or this grant did not have to wait for it
			f.granted, f.due = min(max(f.due, now-spreadMost), now), 0
		}
		q.virtual = max(q.virtual, f.tag)
		t.estimate = q.estimate(f)
		t.since = now
		q.charge(f, t.estimate)
		q.see(f, now)
		return t, 0
	}
	return nil, 0
}

// hold counts a connection that id has without having waited for it. Nothing is charged for it so far.
func (q *fairQueue) hold(id string, weight float64) *flow {
	f := q.flow(id)
	q.activate(f, weight)
	f.held++
	return f
}

// release takes back a connection that f has had for d, of which an estimate has been charged.
func (q *fairQueue) release(f *flow, estimate float64, d, now time.Duration) {
	q.see(f, now)
	seconds := max(d, 0).Seconds()
	learn(&f.usual, seconds)
	learn(&q.usual, seconds)
	f.held--
	q.charge(f, seconds-estimate)
	if f.parked && f.held < q.limit {
		q.unpark(f)
	}
	if !f.active() {
		q.deactivate(f)
	}
}

// delay is how long n tickets of f's will take to be granted, at the present pace, or 0 if that is not known.
func (q *fairQueue) delay(f *flow, n int) time.Duration {
	// It is served as often as its connections are returned, or its turn comes among those who wait.
	servers := max(float64(f.held), float64(q.max)/float64(max(q.active, 1)))
	usual := f.usual
	if usual == 0 {
		usual = q.usual
	}
	return time.Duration(float64(n) * usual / servers * float64(time.Second))
}

// see notes that f has come or gone.
func (q *fairQueue) see(f *flow, now time.Duration) {
	if f.id != q.lastSeen {
		q.lastSeen, q.seenOld = f.id, q.seen
	}
	q.seen = now
}

// others is when a flow other than f last came or went.
func (q *fairQueue) others(f *flow) time.Duration {
	if f.id == q.lastSeen {
		return q.seenOld
	}
	return q.seen
}

// spacing is how far apart grants to f beyond its limit are.
func (q *fairQueue) spacing(f *flow) time.Duration {
	return min(time.Duration(spread*f.usual/float64(q.max)*float64(time.Second)), spreadMost)
}

// look has those at their limit looked at again, which time alone may free.
func (q *fairQueue) look() {
	for len(q.parked) > 0 {
		q.unpark(q.parked[0])
	}
}

func (q *fairQueue) flow(id string) *flow {
	f := q.flows[id]
	if f == nil {
		f = &flow{id: id, weight: DefaultWeight, tag: q.virtual, index: notQueued}
		q.flows[id] = f
	}
	return f
}

// enter gives a flow that begins to wait its place.
func (q *fairQueue) enter(f *flow) {
	f.tag = max(f.tag, q.virtual)
	q.clock++
	f.order = q.clock
	q.place(f)
}

// place puts f where its tag belongs.
func (q *fairQueue) place(f *flow) {
	if f.index == notQueued {
		heap.Push(&q.byTag, f)
	} else {
		heap.Fix(&q.byTag, f.index)
	}
}

// catchUp takes out the first flow, which does not wait: virtual time has come to where it is.
func (q *fairQueue) catchUp(f *flow) {
	heap.Pop(&q.byTag)
	q.virtual = max(q.virtual, f.tag)
	if f.held == 0 {
		delete(q.flows, f.id)
	}
}

// charge moves f's tag by so many seconds of a connection.
func (q *fairQueue) charge(f *flow, seconds float64) {
	f.tag += seconds / f.weight
	q.clock++
	f.order = q.clock
	if f.index != notQueued {
		heap.Fix(&q.byTag, f.index)
	}
}

func (q *fairQueue) estimate(f *flow) float64 {
	switch {
	case f.usual > 0:
		return f.usual
	case q.usual > 0:
		return q.usual
	}
	return usualAtFirst
}

// learn moves a mean towards the newest value.
func learn(mean *float64, value float64) {
	if *mean == 0 {
		*mean = value
	} else {
		*mean += (value - *mean) / 8
	}
}

// activate counts a flow that is about to wait or to hold, and gives it the weight that its tenant has now.
func (q *fairQueue) activate(f *flow, weight float64) {
	if f.active() {
		q.weight -= f.weight
	} else {
		q.active++
	}
	q.weight += weight
	f.weight = weight
}

// deactivate ends a flow that neither waits nor holds. It is forgotten, unless its tag is ahead: then it is
// when the others have come there.
func (q *fairQueue) deactivate(f *flow) {
	q.active--
	q.weight -= f.weight
	switch {
	case f.tag > q.virtual:
		q.place(f)
	default:
		if f.index != notQueued {
			heap.Remove(&q.byTag, f.index)
		}
		delete(q.flows, f.id)
	}
	if q.active == 1 {
		q.look() // who is left may have more
	}
}

func (q *fairQueue) unpark(f *flow) {
	for i, p := range q.parked {
		if p == f {
			last := len(q.parked) - 1
			q.parked[i], q.parked[last] = q.parked[last], nil
			q.parked = q.parked[:last]
			break
		}
	}
	f.parked = false
	if f.n > 0 {
		q.place(f)
	}
}

// unlink takes a ticket out of its flow's list.
func (q *fairQueue) unlink(t *ticket) {
	f := t.flow
	if t.prev == nil {
		f.first = t.next
	} else {
		t.prev.next = t.next
	}
	if t.next == nil {
		f.last = t.prev
	} else {
		t.next.prev = t.prev
	}
	t.prev, t.next, t.queued = nil, nil, false
	f.n--
	q.waiting--
}

// flowHeap orders flows by their tags.
type flowHeap []*flow

func (h flowHeap) Len() int { return len(h) }
func (h flowHeap) Less(i, j int) bool {
	if h[i].tag != h[j].tag {
		return h[i].tag < h[j].tag
	}
	return h[i].order < h[j].order
}
func (h flowHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *flowHeap) Push(x any) {
	f := x.(*flow)
	f.index = len(*h)
	*h = append(*h, f)
}
func (h *flowHeap) Pop() any {
	last := len(*h) - 1
	f := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	f.index = notQueued
	return f
}
