package pgxtenant

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// PlanInstall returns the SQL that Registry.Install would run now, and with Config.Seal also that of InstallSeal.
//
// This, PlanProvision and PlanDeprovision run the call itself in a transaction that is rolled back, so they fail where the
// call would. They need the same rights, hold the same locks for a moment, and fail where a lock is not free within
// 5 seconds. Schemas are not dropped and tenants' rows not deleted meanwhile, and databases only looked at. The text is for psql,
// as the same role, in the same database unless a comment names another; BEGIN and COMMIT stand where the call has
// them. Where the call waits, a comment says for how long. Connection strings, keys and seals are left out, and a comment
// says so: such a plan is to be read, and not to be run.
func (db *TenantDB) PlanInstall(ctx context.Context) (string, error) {
	if db.registry == nil {
		return "", ErrNoRegistry
	}
	return db.planned(ctx, func(on *planDB) error {
		if err := db.registry.install(ctx, on); err != nil {
			return err
		}
		if db.config.Seal == nil {
			return nil
		}
		return db.config.Seal.install(ctx, on, db.appRole(), false)
	})
}

// PlanProvision returns the SQL that Provision would run now; see PlanInstall.
func (db *TenantDB) PlanProvision(ctx context.Context, t Tenant, options ...ProvisionOption) (string, error) {
	return db.planned(ctx, func(on *planDB) error { return db.provisionOn(ctx, on, t, options) })
}

// PlanDeprovision returns the SQL that Deprovision would run now; see PlanInstall.
func (db *TenantDB) PlanDeprovision(ctx context.Context, tenantID string, options ...DeprovisionOption) (string, error) {
	return db.planned(ctx, func(on *planDB) error { return db.deprovisionOn(ctx, on, tenantID, options) })
}

// planned runs f in a transaction that is rolled back, and returns what it ran.
func (db *TenantDB) planned(ctx context.Context, f func(on *planDB) error) (string, error) {
	admin, err := db.adminPool()
	if err != nil {
		return "", err
	}
	tx, err := admin.Begin(ctx)
	if err != nil {
		return "", fmt.Errorf("pgxtenant: plan: %w", err)
	}
	defer func() { // what fails closes the connection, which does the same
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		_ = tx.Rollback(end)
	}()
	if _, err := tx.Exec(ctx, "set local lock_timeout = '5s'"); err != nil {
		return "", fmt.Errorf("pgxtenant: plan: %w", err)
	}
	p := &plan{}
	if err := f(&planDB{plannedTx{tx, p, 0, 0}, admin.Config()}); err != nil {
		return "", err
	}
	return p.String(), nil
}

// plan is SQL in the making.
type plan struct {
	lines     []string
	elsewhere bool // the last lines are for another database than the shared one
	concealed bool
}

func (p *plan) note(text string) { p.lines = append(p.lines, "-- "+text) }

// home is called before a line for the shared database.
func (p *plan) home() {
	if p.elsewhere {
		p.note("what follows is for the shared database again")
		p.elsewhere = false
	}
}

func (p *plan) add(sql string, args []any) {
	sql = p.inline(sql, args)
	// A comment at the end would hide the semicolon.
	p.lines = append(p.lines, strings.TrimRight(sql, "; \t\n")+"\n;")
}

func (p *plan) String() string {
	var sb strings.Builder
	if p.concealed {
		sb.WriteString("-- To be read, and not to be run: secrets are left out, where it says '…'.\n")
	}
	for _, line := range p.lines {
		if bare, ok := strings.CutSuffix(line, "\n;"); ok && !strings.Contains(bare[strings.LastIndexByte(bare, '\n')+1:], "--") {
			line = bare + ";"
		}
		sb.WriteString(line + "\n")
	}
	return sb.String()
}

// inline puts the arguments of a statement into its text.
func (p *plan) inline(sql string, args []any) string {
	if len(args) == 0 {
		return sql
	}
	var sb strings.Builder
	l := lexer{text: sql}
	for l.pos < len(sql) {
		start := l.pos
		switch c := sql[l.pos]; {
		case c == '\'':
			l.skipString(false)
		case c == '"':
			l.skipQuoted('"')
		case c == '$':
			l.skipDollar()
			for l.pos == start+1 && l.pos < len(sql) && '0' <= sql[l.pos] && sql[l.pos] <= '9' {
				end := l.pos
				for end < len(sql) && '0' <= sql[end] && sql[end] <= '9' {
					end++
				}
				n, err := strconv.Atoi(sql[l.pos:end])
				l.pos = end
				if err == nil && 1 <= n && n <= len(args) {
					sb.WriteString(p.value(args[n-1]))
					start = l.pos
				}
			}
		default:
			l.pos++
		}
		sb.WriteString(sql[start:l.pos])
	}
	return sb.String()
}

func (p *plan) value(arg any) string {
	switch v := arg.(type) {
	case nil:
		return "null"
	case string:
		return literal(v)
	case *string:
		if v == nil {
			return "null"
		}
		return literal(*v)
	case []string:
		quoted := make([]string, len(v))
		for i, s := range v {
			quoted[i] = literal(s)
		}
		return "array[" + strings.Join(quoted, ", ") + "]::text[]"
	case []byte:
		return `'\x` + hex.EncodeToString(v) + "'"
	case *int64:
		if v == nil {
			return "null"
		}
		return strconv.FormatInt(*v, 10)
	case int:
		return strconv.Itoa(v)
	case concealed:
		if v == "" {
			return "''"
		}
	}
	p.concealed = true // or of a kind that no statement has yet: nothing is shown that might be a secret
	return "'…'"
}

// concealed is an argument that no plan shows, unless it is empty.
type concealed string

// concealedBytes is one that is bytes.
type concealedBytes []byte

// plannedTx runs statements within the transaction that is rolled back, and keeps those that change something.
type plannedTx struct {
	pgx.Tx
	plan  *plan
	depth int // 0: what begins here is a transaction of its own in the plan, and no savepoint
	mark  int // lines in the plan when it began
}

func (t *plannedTx) Begin(ctx context.Context) (pgx.Tx, error) {
	tx, err := t.Tx.Begin(ctx)
	if err != nil {
		return nil, err
	}
	t.plan.home()
	inner := &plannedTx{tx, t.plan, t.depth + 1, len(t.plan.lines)}
	if inner.depth == 1 {
		t.plan.add("begin", nil)
	}
	return inner, nil
}

func (t *plannedTx) Commit(ctx context.Context) error {
	err := t.Tx.Commit(ctx)
	if err == nil && t.depth == 1 {
		t.plan.add("commit", nil)
	}
	return err
}

// Rollback is called after a Commit too, and does nothing then.
func (t *plannedTx) Rollback(ctx context.Context) error {
	err := t.Tx.Rollback(ctx)
	if !errors.Is(err, pgx.ErrTxClosed) {
		t.plan.lines = t.plan.lines[:t.mark]
	}
	return err
}

func (t *plannedTx) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	tag, err := t.Tx.Exec(ctx, sql, args...)
	if err == nil {
		t.plan.home()
		t.plan.add(sql, args)
	}
	return tag, err
}

// QueryRow keeps all but what only reads. That of an error is kept too, but with an error there is no plan.
func (t *plannedTx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	l := lexer{text: sql}
	l.skipBlank()
	if first := strings.ToLower(l.word()); first == "insert" || first == "update" || first == "delete" {
		t.plan.add(sql, args)
	}
	return t.Tx.QueryRow(ctx, sql, args...)
}

// planDB is what a plan has for the Admin pool.
type planDB struct {
	plannedTx
	config *pgxpool.Config
}

func (p *planDB) Config() *pgxpool.Config { return p.config }

// plannedConn is what a plan has for the connection of a DatabaseManager, whose statements cannot be rolled back: it
// reads, and only keeps what would change something.
type plannedConn struct {
	*pgx.Conn
	plan *plan
}

func (c *plannedConn) Exec(_ context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	c.plan.add(sql, args)
	return pgconn.CommandTag{}, nil
}

// destroy runs what removes a tenant's data. For a plan it does not: the locks would keep the tenant from being
// served. What deletes rows the server is asked to explain, which tells whether it can be run.
func destroy(ctx context.Context, tx pgx.Tx, sql string, args ...any) error {
	t, ok := tx.(*plannedTx)
	if !ok {
		_, err := tx.Exec(ctx, sql, args...)
		return err
	}
	if strings.HasPrefix(sql, "delete ") {
		if _, err := t.Tx.Exec(ctx, "explain "+sql, args...); err != nil {
			return err
		}
	}
	t.plan.add(sql, args)
	return nil
}

// noteStatement tells a plan of a statement that goes another way than by Exec.
func noteStatement(tx pgx.Tx, sql string) {
	if t, ok := tx.(*plannedTx); ok {
		t.plan.add(sql, nil)
	}
}

// planOf is the plan that a change goes to, or nil.
func planOf(on adminRunner) *plan {
	if p, ok := on.(*planDB); ok {
		return p.plan
	}
	return nil
}
