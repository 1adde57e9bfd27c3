package main

import (
	"slices"
	"strings"
)

// exception is a test that cannot pass on a bound connection.
type exception struct {
	test   string // package and test, with all its subtests
	reason string
	modes  []string // nil is all
	skip   bool     // it would hang, or fail not always: it is left out
}

const (
	countsBytes    = "counts the bytes on the network, to which the binding adds"
	scriptsServer  = "plays a server that does not answer the binding"
	ownSearchPath  = "sets a search_path, which that of a schema tenant replaces"
	wantsPublic    = "expects to find in public what it creates, which is in the tenant's schema"
	temporaryTable = "expects a temporary table at the next checkout, which is another tenant's"
	channelBinding = "pgconn takes the channel binding from a *tls.Conn only, and AfterNetConnect replaces that"
)

var rotating = []string{"rotate", "rotate-strict"}

var exceptions = []exception{
	{test: ". TestBatchNetworkUsage", reason: countsBytes},
	{test: ". TestQueryNetworkUsage", reason: countsBytes},
	{test: ". TestPrepareFailedParseSchedulesNoCleanup", reason: "looks for a Close message, and finds that of the binding", modes: []string{"unprepared"}},
	{test: "pgconn TestConnExecStatementNetworkUsage", reason: countsBytes},
	{test: "pgconn TestAsyncCloseDrainsBeforeClose", reason: scriptsServer},
	{test: "pgconn TestFatalErrorReceivedInPipelineMode", reason: scriptsServer},
	{test: "pgconn TestConnOnPgErrorClosesConnection", reason: scriptsServer, modes: []string{"sealed"}},
	{test: "pgconn TestConnectWithAfterNetConnect", reason: "wants to find its own net.Conn, not one around it"},
	{test: "pgconn TestConnectChannelBindingSCRAM", reason: channelBinding},
	{test: ". TestCompositeCodecTranscodeWithLoadTypes", reason: wantsPublic, modes: []string{"schema"}},
	{test: ". TestLoadTypesSharedDependencies", reason: wantsPublic, modes: []string{"schema"}},
	{test: "pgconn TestConnExecParamsContextCanceledAfterResponseBuffered", reason: "waits for the answer to the first of the pieces", modes: []string{"fragments"}, skip: true},
	{test: "pgconn TestPipelineCloseDoesNotPanicOnMultipleFatalErrors", reason: "plays a server that closes the connection between two pieces", modes: []string{"fragments"}, skip: true},
	{test: "pgxpool TestPoolAcquireChecksIdleConns", reason: "counts on a dead connection being noticed when it reads, not at the second piece it writes", modes: []string{"fragments"}, skip: true},
	{test: "pgxpool TestConnectConfig", reason: "expects no PrepareConn in the config", modes: rotating},
	{test: "pgxpool TestTxBeginFuncNestedTransactionCommit", reason: temporaryTable, modes: rotating},
	{test: "pgxpool TestTxBeginFuncNestedTransactionRollback", reason: temporaryTable, modes: rotating},
	{test: "pgtype TestDerivedTypes", reason: wantsPublic, modes: []string{"schema"}},
	{test: "pgconn TestConnectWithAfterConnect", reason: ownSearchPath, modes: []string{"schema"}},
	{test: "pgconn TestConnectWithRuntimeParams", reason: ownSearchPath, modes: []string{"schema"}},
	{test: "pgconn TestConnectTLS/WithChannelBinding", reason: channelBinding},
}

func (e *exception) in(mode string) bool { return e.modes == nil || slices.Contains(e.modes, mode) }

func exceptionFor(key, mode string) *exception {
	for i := range exceptions {
		if e := &exceptions[i]; e.in(mode) && (key == e.test || strings.HasPrefix(key, e.test+"/")) {
			return e
		}
	}
	return nil
}
