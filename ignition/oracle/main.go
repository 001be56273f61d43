// Command oracle judges configurations with the real libraries: Butane, the Container Linux Config Transpiler,
// Ignition of spec 2 and 3, ign-converter and coreos-cloudinit.
//
// Standard input has one question a line, as JSON; each gets one line of answer on standard output, in the same order.
// A question that the real program would end with an exit code other than 0 has its words in "error" and no "output".
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"os"
)

// question is one line of input.
type question struct {
	ID   string `json:"id"`
	Tool string `json:"tool"`
	Args args   `json:"args"`
	// Text is the configuration; Second the one that is merged into it or appended to it, where the tool takes two.
	Text   string `json:"text"`
	Second string `json:"second"`
}

// args are the options of all tools; each takes those that its own program knows.
type args struct {
	Strict   bool   `json:"strict"`
	Pretty   bool   `json:"pretty"`
	FilesDir string `json:"files_dir"`
	// Platform is that of a Container Linux Config, "" for none.
	Platform string `json:"platform"`
	// Version is the Ignition spec's ("3.4.0"); without it the newest stable one of the tool.
	Version string `json:"version"`
	// Exact takes only a configuration of Version itself, not older ones to be translated up to it.
	Exact bool `json:"exact"`
	// Filesystems says where filesystems of spec 2 are mounted, for the way up to spec 3.
	Filesystems map[string]string `json:"filesystems"`
}

// answer is one line of output.
type answer struct {
	ID     string  `json:"id"`
	Output *string `json:"output"`
	Report []entry `json:"report"`
	Error  string  `json:"error"`
}

// entry is one finding; Line and Column count from 1, 0 where the tool does not say.
type entry struct {
	Severity string `json:"severity"`
	Line     int64  `json:"line"`
	Column   int64  `json:"column"`
	Path     string `json:"path"`
	Message  string `json:"message"`
}

// tool answers one kind of question: its output, what it reports, and what makes the real program fail.
type tool func(question) (string, []entry, error)

var tools = map[string]tool{
	"butane":           runButane,
	"ct":               runTranspiler,
	"ignition2":        parseSpec2,
	"ignition2-append": appendSpec2,
	"ignition3":        parseSpec3,
	"ignition3-merge":  mergeSpec3,
	"convert-2to3":     convertUp,
	"convert-3to2":     convertDown,
	"convert-3to3":     convertDownWithin3,
	"cloud-config":     validateCloudConfig,
}

// The transpiler looks its folder of local files up among the program's flags.
var filesDir = flag.String("files-dir", "", "set by each question")

func main() {
	flag.Parse()
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "oracle:", err)
		os.Exit(1)
	}
}

func serve() error {
	in := json.NewDecoder(bufio.NewReaderSize(os.Stdin, 1<<20))
	out := bufio.NewWriter(os.Stdout)
	lines := json.NewEncoder(out)
	lines.SetEscapeHTML(false)
	for in.More() {
		var q question
		if err := in.Decode(&q); err != nil {
			return fmt.Errorf("a question is not JSON: %w", err)
		}
		if err := lines.Encode(ask(q)); err != nil {
			return err
		}
		// Each answer is told at once, so that a client may ask one at a time.
		if err := out.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// ask never panics: some of these libraries do on hostile input, which is an answer too.
func ask(q question) (a answer) {
	a = answer{ID: q.ID, Report: []entry{}}
	defer func() {
		if cause := recover(); cause != nil {
			a.Output, a.Error = nil, fmt.Sprintf("panic: %v", cause)
		}
	}()
	run, known := tools[q.Tool]
	if !known {
		a.Error = fmt.Sprintf("there is no tool %q", q.Tool)
		return a
	}
	output, report, err := run(q)
	if report != nil {
		a.Report = report
	}
	if err != nil {
		a.Error = err.Error()
		return a
	}
	a.Output = &output
	return a
}
