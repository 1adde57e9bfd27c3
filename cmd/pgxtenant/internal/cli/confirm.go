package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// yesFlag adds --yes to a command that destroys something.
func yesFlag(cmd *cobra.Command) *bool { return cmd.Flags().BoolP("yes", "y", false, "do not ask") }

// confirm asks a question whose answer is the given word. Where nobody can be asked it refuses.
func (a *app) confirm(ctx context.Context, word, format string, args ...any) error {
	question := fmt.Sprintf(format, args...)
	if !term.IsTerminal(int(a.in.Fd())) {
		return &exitError{exitRefused, errors.New(question + "\nNobody can be asked, for stdin is no terminal; say --yes if it is meant. Nothing was done.")}
	}
	a.err.line("%s", question)
	fmt.Fprintf(a.err, "Type %s to go on: ", word)
	answer, err := readLine(ctx, a.in)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if answer != word {
		return &exitError{exitRefused, errors.New("not confirmed; nothing was done")}
	}
	return nil
}

// readLine leaves its goroutine behind when ctx ends, for a read from a terminal cannot be stopped; the program
// ends then.
func readLine(ctx context.Context, from io.Reader) (string, error) {
	type result struct {
		line string
		err  error
	}
	read := make(chan result, 1)
	go func() {
		line, err := bufio.NewReader(from).ReadString('\n')
		read <- result{strings.TrimSpace(line), err}
	}()
	select {
	case r := <-read:
		return r.line, r.err
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}
