package main

import (
	"errors"
	"fmt"

	"github.com/coreos/ignition/v2/config/v3_0"
	"github.com/coreos/ignition/v2/config/v3_1"
	"github.com/coreos/ignition/v2/config/v3_2"
	"github.com/coreos/ignition/v2/config/v3_3"
	"github.com/coreos/ignition/v2/config/v3_4"
	"github.com/coreos/ignition/v2/config/v3_5"
	"github.com/coreos/ignition/v2/config/v3_6"

	// Leaves out empty objects, as Butane does.
	"github.com/clarketm/json"
	"github.com/coreos/vcontext/report"
)

// spec3 has what a version's package does, whatever its type of configuration is.
type spec3 struct {
	// parse takes the version and older ones, and leaves its own.
	parse func([]byte) (any, report.Report, error)
	merge func(parent, child any) any
}

func spec3Of[C any](parse func([]byte) (C, report.Report, error), merge func(C, C) C) spec3 {
	return spec3{
		parse: func(raw []byte) (any, report.Report, error) { return parse(raw) },
		merge: func(parent, child any) any { return merge(parent.(C), child.(C)) },
	}
}

var specs3 = map[string]spec3{
	"3.0.0": spec3Of(v3_0.Parse, v3_0.Merge),
	"3.1.0": spec3Of(v3_1.ParseCompatibleVersion, v3_1.Merge),
	"3.2.0": spec3Of(v3_2.ParseCompatibleVersion, v3_2.Merge),
	"3.3.0": spec3Of(v3_3.ParseCompatibleVersion, v3_3.Merge),
	"3.4.0": spec3Of(v3_4.ParseCompatibleVersion, v3_4.Merge),
	"3.5.0": spec3Of(v3_5.ParseCompatibleVersion, v3_5.Merge),
	"3.6.0": spec3Of(v3_6.ParseCompatibleVersion, v3_6.Merge),
}

func parseSpec3(q question) (string, []entry, error) {
	spec, err := findSpec3(&q)
	if err != nil {
		return "", nil, err
	}
	config, entries, err := spec.read(q, q.Text)
	if err != nil {
		return "", entries, err
	}
	output, err := json.Marshal(config)
	return string(output), entries, err
}

func mergeSpec3(q question) (string, []entry, error) {
	spec, err := findSpec3(&q)
	if err != nil {
		return "", nil, err
	}
	parent, entries, err := spec.read(q, q.Text)
	if err != nil {
		return "", entries, err
	}
	child, more, err := spec.read(q, q.Second)
	entries = append(entries, more...)
	if err != nil {
		return "", entries, err
	}
	output, err := json.Marshal(spec.merge(parent, child))
	return string(output), entries, err
}

func findSpec3(q *question) (spec3, error) {
	if q.Args.Version == "" {
		q.Args.Version = "3.6.0"
	}
	spec, known := specs3[q.Args.Version]
	if !known {
		return spec3{}, fmt.Errorf("there is no spec %q", q.Args.Version)
	}
	return spec, nil
}

func (spec spec3) read(q question, text string) (any, []entry, error) {
	if err := checkExact(q, text); err != nil {
		return nil, nil, err
	}
	config, found, err := spec.parse([]byte(text))
	entries := fromContext(found)
	if err == nil && found.IsFatal() {
		err = errors.New("config is not valid")
	}
	if err == nil && q.Args.Strict && len(entries) > 0 {
		err = errStrict
	}
	return config, entries, err
}
