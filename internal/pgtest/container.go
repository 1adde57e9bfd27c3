package pgtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pgxtenant/pgxtenant/internal/freeport"
)

// module is what the program of the folder container belongs to.
const module = "github.com/pgxtenant/pgxtenant"

// containerTimeout allows for compiling the program and pulling the image.
const containerTimeout = 5 * time.Minute

func haveDocker(ctx context.Context) bool {
	if os.Getenv("DOCKER_HOST") != "" {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return exec.CommandContext(ctx, "docker", "info").Run() == nil
}

// startContainer starts the server by way of the program in the folder container.
func (s *Server) startContainer(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "pgtest-")
	if err != nil {
		return fmt.Errorf("pgtest: %w", err)
	}
	engine := &containerEngine{server: s}
	defer func() {
		if err != nil {
			err = errors.Join(err, engine.close(), os.RemoveAll(dir))
		}
	}()
	cert, key, err := newCertificate()
	if err != nil {
		return err
	}
	password, _ := s.url.User.Password()
	for name, content := range map[string][]byte{"server.crt": cert, "server.key": key, "password": []byte(password)} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return fmt.Errorf("pgtest: %w", err)
		}
	}
	s.cert = filepath.Join(dir, "server.crt")
	port, err := freeport.Pick()
	if err != nil {
		return err
	}
	// The test may be in another module of this repository.
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		return fmt.Errorf("pgtest: go list: %w", err)
	}
	cmd := exec.Command("go", append([]string{"run", "./internal/pgtest/container", dir, strconv.Itoa(port)}, serverSettings...)...)
	cmd.Dir = strings.TrimSpace(string(root))
	cmd.SysProcAttr = ownSession()
	if engine.helper, err = startHelper(cmd); err != nil {
		return err
	}
	answer, err := engine.read(containerTimeout)
	if err != nil {
		return err
	}
	host, found := strings.CutPrefix(answer, "host ")
	if !found {
		return fmt.Errorf("pgtest: container: %s", answer)
	}
	s.url.Host = net.JoinHostPort(host, strconv.Itoa(port))
	s.engine = engine
	return engine.waitUntilReady()
}

// containerEngine runs the server in a container.
type containerEngine struct {
	*helper
	server *Server
}

func (e *containerEngine) start() error {
	if err := e.call("start", startTimeout); err != nil {
		return err
	}
	return e.waitUntilReady()
}

func (e *containerEngine) stop(mode stopMode) error {
	return e.call("stop "+string(mode), startTimeout)
}

func (e *containerEngine) close() error {
	if e.helper == nil {
		return nil
	}
	return e.helper.close()
}

// waitUntilReady tries to connect. The image's first start listens over TCP only
// once it has set up the database.
func (e *containerEngine) waitUntilReady() (err error) {
	for deadline := time.Now().Add(startTimeout); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = execute(context.Background(), e.server.URL("connect_timeout=5")); err == nil {
			return nil
		}
	}
	return fmt.Errorf("pgtest: the container's server did not start within %v: %w", startTimeout, err)
}
