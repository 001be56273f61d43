package main

import (
	"encoding/json"

	"github.com/coreos/coreos-cloudinit/config"
	"github.com/coreos/coreos-cloudinit/config/validate"
)

// validateCloudConfig has as output the configuration as coreos-cloudinit understood it, its files decoded; field names
// are those of its Go types. A script and an Ignition configuration are valid and have no output.
func validateCloudConfig(q question) (string, []entry, error) {
	found, err := validate.Validate([]byte(q.Text))
	if err != nil {
		return "", nil, err
	}
	entries := make([]entry, 0, len(found.Entries()))
	fatal := false
	for _, e := range found.Entries() {
		// Its fields are readable only through its JSON.
		raw, err := json.Marshal(e)
		if err != nil {
			return "", nil, err
		}
		var fields struct {
			Kind    string
			Line    int64
			Message string
		}
		if err := json.Unmarshal(raw, &fields); err != nil {
			return "", nil, err
		}
		fatal = fatal || fields.Kind == "error"
		entries = append(entries, entry{Severity: fields.Kind, Line: fields.Line, Message: fields.Message})
	}
	if fatal {
		return "", entries, errInvalid
	}
	if q.Args.Strict && len(entries) > 0 {
		return "", entries, errStrict
	}
	if !config.IsCloudConfig(q.Text) {
		return "", entries, nil
	}
	understood, err := config.NewCloudConfig(q.Text)
	if err != nil {
		return "", entries, err
	}
	if err := understood.Decode(); err != nil {
		return "", entries, err
	}
	output, err := json.Marshal(understood)
	return string(output), entries, err
}
