// Package dashboardtest holds tenantprom's dashboard, its alerts and its documentation against what a Collector really
// exports. It is a module of its own for the sake of Prometheus' parser.
package dashboardtest
