package pgxtenant

import (
	"math"
	"math/bits"
)

// distinct estimates how many different strings were added, by their hashes, by the HyperLogLog algorithm of Flajolet, Fusy,
// Gandouet and Meunier (2007).
type distinct struct {
	registers [1 << distinctBits]uint8
	n         int  // of the first LoadTenants added
	full      bool // there were more than LoadTenants
}

const distinctBits = 11 // a standard error of 1.04/√2048

// add adds the string with hash h.
func (d *distinct) add(h uint64) {
	if d.n++; d.n > LoadTenants {
		d.full = true
	}
	r := &d.registers[h>>(64-distinctBits)]
	*r = max(*r, uint8(bits.LeadingZeros64(h<<distinctBits|1<<(distinctBits-1)))+1)
}

func (d *distinct) merge(o *distinct) {
	for i, r := range o.registers {
		d.registers[i] = max(d.registers[i], r)
	}
	d.full = d.full || o.full
}

func (d *distinct) estimate() int {
	const m = 1 << distinctBits
	sum, empty := 0.0, 0
	for _, r := range d.registers {
		sum += math.Ldexp(1, -int(r))
		if r == 0 {
			empty++
		}
	}
	e := 0.7213 / (1 + 1.079/m) * m * m / sum
	if e <= 2.5*m && empty > 0 {
		e = m * math.Log(m/float64(empty)) // counting the empty ones is better for few
	}
	return int(math.Round(e))
}
