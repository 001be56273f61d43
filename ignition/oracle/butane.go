package main

import (
	"errors"

	"github.com/coreos/butane/config"
	"github.com/coreos/butane/config/common"
	"github.com/coreos/vcontext/report"
)

var errStrict = errors.New("there are findings, and strict was asked for")

func runButane(q question) (string, []entry, error) {
	options := common.TranslateBytesOptions{Pretty: q.Args.Pretty}
	options.FilesDir = q.Args.FilesDir
	output, found, err := config.TranslateBytes([]byte(q.Text), options)
	entries := fromContext(found)
	if err == nil && q.Args.Strict && len(entries) > 0 {
		err = errStrict
	}
	return string(output), entries, err
}

// fromContext takes the findings of Butane and of Ignition's spec 3.
func fromContext(found report.Report) []entry {
	entries := make([]entry, 0, len(found.Entries))
	for _, e := range found.Entries {
		one := entry{Severity: e.Kind.String(), Path: e.Context.String(), Message: e.Message}
		if start := e.Marker.StartP; start != nil {
			one.Line, one.Column = start.Line, start.Column
		}
		entries = append(entries, one)
	}
	return entries
}
