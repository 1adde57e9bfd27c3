package pgtest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// helper is a child process that answers each line of its standard input with one
// line of its standard output, and ends when its input does: so it ends with this
// process too. One goroutine at a time may use it. It needs no goroutine of its own,
// so tests may look for leaked ones while it runs.
type helper struct {
	cmd    *exec.Cmd
	input  io.WriteCloser
	output *os.File
	lines  *bufio.Reader
}

func startHelper(cmd *exec.Cmd) (*helper, error) {
	input, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("pgtest: %w", err)
	}
	file := output.(*os.File) // for its deadline
	return &helper{cmd: cmd, input: input, output: file, lines: bufio.NewReader(file)}, nil
}

// call sends one line and waits for the answer. Any answer but "ok" is an error.
func (h *helper) call(line string, timeout time.Duration) error {
	if _, err := io.WriteString(h.input, line+"\n"); err != nil {
		return fmt.Errorf("pgtest: helper: %w", err)
	}
	answer, err := h.read(timeout)
	if err != nil {
		return err
	}
	if answer != "ok" {
		return errors.New(answer)
	}
	return nil
}

func (h *helper) read(timeout time.Duration) (string, error) {
	if err := h.output.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return "", fmt.Errorf("pgtest: helper: %w", err)
	}
	line, err := h.lines.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("pgtest: helper: %w", err)
	}
	return strings.TrimSuffix(line, "\n"), nil
}

// close closes the helper's input and waits until it has cleaned up.
func (h *helper) close() error {
	if err := h.input.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("pgtest: helper: %w", err)
	}
	if err := h.cmd.Wait(); err != nil {
		return fmt.Errorf("pgtest: helper: %w", err)
	}
	return nil
}
