package main

import (
	"encoding/json"
	"errors"

	"github.com/coreos/container-linux-config-transpiler/config"
	"github.com/coreos/ignition/config/validate/report"
)

func runTranspiler(q question) (string, []entry, error) {
	*filesDir = q.Args.FilesDir
	parsed, ast, found := config.Parse([]byte(q.Text))
	entries := fromAst(found)
	if found.IsFatal() {
		return "", entries, errors.New("failed to parse config")
	}
	if q.Args.Strict && len(entries) > 0 {
		return "", entries, errStrict
	}
	converted, found := config.Convert(parsed, q.Args.Platform, ast)
	entries = append(entries, fromAst(found)...)
	if found.IsFatal() {
		return "", entries, errors.New("failed to convert config")
	}
	if q.Args.Strict && len(entries) > 0 {
		return "", entries, errStrict
	}
	var output []byte
	var err error
	if q.Args.Pretty {
		output, err = json.MarshalIndent(&converted, "", "  ")
	} else {
		output, err = json.Marshal(&converted)
	}
	return string(output), entries, err
}

// fromAst takes the findings of the transpiler and of Ignition's spec 2, which name no path.
func fromAst(found report.Report) []entry {
	entries := make([]entry, 0, len(found.Entries))
	for _, e := range found.Entries {
		entries = append(entries, entry{
			Severity: e.Kind.String(), Line: int64(e.Line), Column: int64(e.Column), Message: e.Message,
		})
	}
	return entries
}
