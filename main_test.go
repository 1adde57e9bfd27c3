package pgxtenant

import (
	"testing"

	"github.com/pgxtenant/pgxtenant/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }
