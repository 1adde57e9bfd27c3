package pgxtenant

import (
	"context"
	"net"

	"github.com/jackc/pgx/v5/pgxpool"
)

// internal/pgxsuite/hook.go.txt calls these, and is compiled by make pgx-suite alone.
var (
	_ func(net.Conn, bool, bool) *wireConn                                                = newWireConn
	_ func(*wireConn, *binding) (bool, error)                                             = (*wireConn).assign
	_ func(*binder, *tenantContext, *Tenant) (*binding, error)                            = (*binder).bind
	_ func(*binder, *pgxpool.Config, *loadMeter, func(context.Context) (*binding, error)) = (*binder).install
	_ func(*Config) *loadMeter                                                            = newLoadMeter
)
