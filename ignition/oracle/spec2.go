package main

import (
	"encoding/json"
	"errors"
	"fmt"

	v2_0 "github.com/coreos/ignition/config/v2_0"
	v2_1 "github.com/coreos/ignition/config/v2_1"
	v2_2 "github.com/coreos/ignition/config/v2_2"
	v2_3 "github.com/coreos/ignition/config/v2_3"
	v2_4 "github.com/coreos/ignition/config/v2_4"

	"github.com/coreos/go-semver/semver"
	"github.com/coreos/ignition/config/validate/report"
)

// spec2 has what a version's package does, whatever its type of configuration is.
type spec2 struct {
	// parse takes the version and older ones, and leaves its own.
	parse func([]byte) (any, report.Report, error)
	merge func(older, newer any) any
}

func spec2Of[C any](parse func([]byte) (C, report.Report, error), merge func(C, C) C) spec2 {
	return spec2{
		parse: func(raw []byte) (any, report.Report, error) { return parse(raw) },
		merge: func(older, newer any) any { return merge(older.(C), newer.(C)) },
	}
}

var specs2 = map[string]spec2{
	"2.0.0": spec2Of(v2_0.Parse, v2_0.Append),
	"2.1.0": spec2Of(v2_1.Parse, v2_1.Append),
	"2.2.0": spec2Of(v2_2.Parse, v2_2.Append),
	"2.3.0": spec2Of(v2_3.Parse, v2_3.Append),
	"2.4.0": spec2Of(v2_4.Parse, v2_4.Append),
}

func parseSpec2(q question) (string, []entry, error) {
	spec, err := findSpec2(&q)
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

func appendSpec2(q question) (string, []entry, error) {
	spec, err := findSpec2(&q)
	if err != nil {
		return "", nil, err
	}
	older, entries, err := spec.read(q, q.Text)
	if err != nil {
		return "", entries, err
	}
	newer, more, err := spec.read(q, q.Second)
	entries = append(entries, more...)
	if err != nil {
		return "", entries, err
	}
	output, err := json.Marshal(spec.merge(older, newer))
	return string(output), entries, err
}

func findSpec2(q *question) (spec2, error) {
	if q.Args.Version == "" {
		q.Args.Version = "2.4.0"
	}
	spec, known := specs2[q.Args.Version]
	if !known {
		return spec2{}, fmt.Errorf("there is no spec %q", q.Args.Version)
	}
	return spec, nil
}

func (spec spec2) read(q question, text string) (any, []entry, error) {
	if err := checkExact(q, text); err != nil {
		return nil, nil, err
	}
	config, found, err := spec.parse([]byte(text))
	entries := fromAst(found)
	if err == nil && found.IsFatal() {
		err = errors.New("config is not valid")
	}
	if err == nil && q.Args.Strict && len(entries) > 0 {
		err = errStrict
	}
	return config, entries, err
}

// checkExact refuses a configuration of another version, where only args.Version itself is asked for.
func checkExact(q question, text string) error {
	if !q.Args.Exact {
		return nil
	}
	var head struct {
		Ignition struct{ Version string }
	}
	// What is no JSON at all, the real parser describes better.
	if json.Unmarshal([]byte(text), &head) != nil {
		return nil
	}
	said, err := semver.NewVersion(head.Ignition.Version)
	if err != nil || said.String() != q.Args.Version {
		return fmt.Errorf("version %q is not %q", head.Ignition.Version, q.Args.Version)
	}
	return nil
}
