package cli

import (
	"crypto/sha256"
	"encoding/hex"

	"github.com/pgxtenant/pgxtenant"
)

// The parts of SARIF 2.1.0 that a report has.
type (
	sarifLog struct {
		Schema  string     `json:"$schema"`
		Version string     `json:"version"`
		Runs    []sarifRun `json:"runs"`
	}
	sarifRun struct {
		Tool    sarifTool     `json:"tool"`
		Results []sarifResult `json:"results"`
	}
	sarifTool struct {
		Driver sarifDriver `json:"driver"`
	}
	sarifDriver struct {
		Name           string      `json:"name"`
		InformationURI string      `json:"informationUri"`
		Rules          []sarifRule `json:"rules"`
	}
	sarifRule struct {
		ID               string       `json:"id"`
		ShortDescription sarifMessage `json:"shortDescription"`
		DefaultConfig    sarifLevel   `json:"defaultConfiguration"`
		HelpURI          string       `json:"helpUri"`
	}
	sarifLevel struct {
		Level string `json:"level"`
	}
	sarifMessage struct {
		Text string `json:"text"`
	}
	sarifResult struct {
		RuleID       string             `json:"ruleId"`
		RuleIndex    int                `json:"ruleIndex"`
		Level        string             `json:"level"`
		Message      sarifMessage       `json:"message"`
		Locations    []sarifLocation    `json:"locations"`
		Fingerprints map[string]string  `json:"partialFingerprints"`
		Suppressions []sarifSuppression `json:"suppressions,omitempty"`
	}
	sarifLocation struct {
		LogicalLocations []sarifLogical `json:"logicalLocations"`
	}
	sarifLogical struct {
		Name string `json:"fullyQualifiedName"`
	}
	sarifSuppression struct {
		Kind          string `json:"kind"`
		Justification string `json:"justification"`
	}
)

const (
	sarifSchema = "https://json.schemastore.org/sarif-2.1.0.json"
	projectURI  = "https://github.com/pgxtenant/pgxtenant"
)

func (a *app) auditSARIF(r *pgxtenant.Report) error { return a.indented(sarifOf(r)) }

func sarifOf(r *pgxtenant.Report) *sarifLog {
	run := sarifRun{Results: []sarifResult{}}
	run.Tool.Driver = sarifDriver{Name: "pgxtenant", InformationURI: projectURI, Rules: []sarifRule{}}
	rules := make(map[string]int)
	levels := map[pgxtenant.Severity]string{pgxtenant.SeverityError: "error", pgxtenant.SeverityWarning: "warning", pgxtenant.SeverityInfo: "note"}
	for _, f := range r.Findings {
		index, known := rules[f.Code]
		if !known {
			index = len(run.Tool.Driver.Rules)
			rules[f.Code] = index
			run.Tool.Driver.Rules = append(run.Tool.Driver.Rules, sarifRule{
				ID: f.Code, ShortDescription: sarifMessage{f.Allows}, DefaultConfig: sarifLevel{levels[f.Severity]},
				HelpURI: projectURI + "/blob/main/docs/audit.md",
			})
		}
		message := f.Object + ": " + f.Allows
		for _, more := range []string{f.Detail, f.Mend} {
			if more != "" {
				message += "\n" + more
			}
		}
		sum := sha256.Sum256([]byte(f.Code + "\x00" + r.Database + "\x00" + f.Object))
		result := sarifResult{
			RuleID: f.Code, RuleIndex: index, Level: levels[f.Severity], Message: sarifMessage{message},
			Locations:    []sarifLocation{{[]sarifLogical{{r.Database + ": " + f.Object}}}},
			Fingerprints: map[string]string{"codeAndObject/v1": hex.EncodeToString(sum[:16])},
		}
		if f.Allowed {
			result.Suppressions = []sarifSuppression{{"external", "listed under audit.allow"}}
		}
		run.Results = append(run.Results, result)
	}
	return &sarifLog{Schema: sarifSchema, Version: "2.1.0", Runs: []sarifRun{run}}
}
