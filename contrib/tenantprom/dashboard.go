package tenantprom

import _ "embed"

// Dashboard is a dashboard for Grafana 12, in JSON. It has a variable for the data source, and one for the job.
//
//go:embed dashboard.json
var Dashboard []byte
