package main

import (
	"errors"
	"fmt"

	"github.com/clarketm/json"
	"github.com/coreos/ign-converter/translate/v23tov30"
	"github.com/coreos/ign-converter/translate/v24tov31"
	"github.com/coreos/ign-converter/translate/v30tov22"
	"github.com/coreos/ign-converter/translate/v31tov22"
	"github.com/coreos/ign-converter/translate/v31tov24"
	"github.com/coreos/ign-converter/translate/v32tov22"
	"github.com/coreos/ign-converter/translate/v32tov24"
	"github.com/coreos/ign-converter/translate/v32tov31"
	"github.com/coreos/ign-converter/translate/v33tov32"
	"github.com/coreos/ign-converter/translate/v34tov33"
	v2_3 "github.com/coreos/ignition/config/v2_3"
	v2_4 "github.com/coreos/ignition/config/v2_4"
	"github.com/coreos/ignition/v2/config/v3_0"
	"github.com/coreos/ignition/v2/config/v3_1"
	"github.com/coreos/ignition/v2/config/v3_2"
	"github.com/coreos/ignition/v2/config/v3_4"
)

var errInvalid = errors.New("config is not valid")

// convertUp goes from 2.0-2.3 to 3.0 if args.version is "3.0.0", else from 2.0-2.4 to 3.1.
func convertUp(q question) (string, []entry, error) {
	// The library writes into the map.
	filesystems := map[string]string{}
	for name, path := range q.Args.Filesystems {
		filesystems[name] = path
	}
	switch q.Args.Version {
	case "3.0.0":
		config, found, err := v2_3.Parse([]byte(q.Text))
		if err != nil || found.IsFatal() {
			return "", fromAst(found), errors.Join(errInvalid, err)
		}
		return written(v23tov30.Translate(config, filesystems))
	case "", "3.1.0":
		config, found, err := v2_4.Parse([]byte(q.Text))
		if err != nil || found.IsFatal() {
			return "", fromAst(found), errors.Join(errInvalid, err)
		}
		return written(v24tov31.Translate(config, filesystems))
	}
	return "", nil, fmt.Errorf("there is no way from spec 2 to %q", q.Args.Version)
}

// convertDown goes to 2.2 if args.version is "2.2.0", else to 2.4; from 3.0, 3.1 or 3.2, whichever the text says.
func convertDown(q question) (string, []entry, error) {
	raw := []byte(q.Text)
	to22 := q.Args.Version == "2.2.0"
	if !to22 && q.Args.Version != "" && q.Args.Version != "2.4.0" {
		return "", nil, fmt.Errorf("there is no way from spec 3 to %q", q.Args.Version)
	}
	if config, _, err := v3_0.Parse(raw); err == nil && to22 {
		return written(v30tov22.Translate(config))
	}
	if config, _, err := v3_1.ParseCompatibleVersion(raw); err == nil {
		if to22 {
			return written(v31tov22.Translate(config))
		}
		return written(v31tov24.Translate(config))
	}
	config, found, err := v3_2.ParseCompatibleVersion(raw)
	if err != nil || found.IsFatal() {
		return "", fromContext(found), errors.Join(errInvalid, err)
	}
	if to22 {
		return written(v32tov22.Translate(config))
	}
	return written(v32tov24.Translate(config))
}

// convertDownWithin3 goes from at most 3.4 down to args.version: 3.3, 3.2 or 3.1.
func convertDownWithin3(q question) (string, []entry, error) {
	config34, found, err := v3_4.ParseCompatibleVersion([]byte(q.Text))
	if err != nil || found.IsFatal() {
		return "", fromContext(found), errors.Join(errInvalid, err)
	}
	config33, err := v34tov33.Translate(config34)
	if err != nil || q.Args.Version == "3.3.0" {
		return written(config33, err)
	}
	config32, err := v33tov32.Translate(config33)
	if err != nil || q.Args.Version == "3.2.0" {
		return written(config32, err)
	}
	if q.Args.Version == "3.1.0" {
		return written(v32tov31.Translate(config32))
	}
	return "", nil, fmt.Errorf("there is no way within spec 3 to %q", q.Args.Version)
}

func written(config any, err error) (string, []entry, error) {
	if err != nil {
		return "", nil, err
	}
	output, err := json.Marshal(config)
	return string(output), nil, err
}
