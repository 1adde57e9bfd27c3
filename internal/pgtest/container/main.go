// Command container runs PostgreSQL in a container for package pgtest, which
// starts it with go run where PostgreSQL's programs are not installed. It is a
// program of its own so that Docker's client is part of no test binary, and of no
// other module's requirements.
//
//	container FOLDER PORT SETTING...
//
// The folder holds server.crt, server.key and the superuser's password. Once the
// container runs, its host is printed as "host NAME". Then it obeys the commands
// "start" and "stop SIGNAL", one a line, and answers each "ok" or with the error.
// At the end of its input it removes the container and the folder.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/testcontainers/testcontainers-go"
)

const image = "postgres:17-alpine"

func main() {
	dir, port, settings := os.Args[1], os.Args[2], os.Args[3:]
	defer os.RemoveAll(dir)
	ctx := context.Background()
	server, err := run(ctx, dir, port, settings)
	defer func() { _ = testcontainers.TerminateContainer(server, testcontainers.StopTimeout(0)) }()
	if err != nil {
		answer(err)
		return
	}
	host, err := server.Host(ctx)
	if err != nil {
		answer(err)
		return
	}
	fmt.Println("host " + host)
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		answer(obey(ctx, server, lines.Text()))
	}
}

func run(ctx context.Context, dir, port string, settings []string) (server *testcontainers.DockerContainer, err error) {
	defer func() {
		if r := recover(); r != nil { // as the library does without an engine
			err = fmt.Errorf("%v", r)
		}
	}()
	password, err := os.ReadFile(filepath.Join(dir, "password"))
	if err != nil {
		return nil, err
	}
	// The server's key must belong to the server's user, whom only the container knows.
	const prepare = `install -o postgres -m 600 /pgtest/server.key /pgtest/server.crt /var/lib/postgresql/ && exec docker-entrypoint.sh "$@"`
	command := []string{"prepare", "postgres",
		"-c", "ssl_cert_file=/var/lib/postgresql/server.crt",
		"-c", "ssl_key_file=/var/lib/postgresql/server.key",
		"-c", "shared_preload_libraries=pg_stat_statements",
	}
	for _, setting := range settings {
		command = append(command, "-c", setting)
	}
	// A fixed port, so that it is the same when the container is started again; on
	// the loopback alone unless the engine is on another machine.
	address := "127.0.0.1:" + port
	if strings.HasPrefix(os.Getenv("DOCKER_HOST"), "tcp:") {
		address = port
	}
	return testcontainers.Run(ctx, image,
		testcontainers.WithEnv(map[string]string{"POSTGRES_PASSWORD": string(password)}),
		testcontainers.WithFiles(
			testcontainers.ContainerFile{HostFilePath: filepath.Join(dir, "server.crt"), ContainerFilePath: "/pgtest/server.crt", FileMode: 0o644},
			testcontainers.ContainerFile{HostFilePath: filepath.Join(dir, "server.key"), ContainerFilePath: "/pgtest/server.key", FileMode: 0o600},
		),
		testcontainers.WithExposedPorts(address+":5432/tcp"),
		testcontainers.WithEntrypoint("sh", "-c", prepare),
		testcontainers.WithCmd(command...),
	)
}

func obey(ctx context.Context, server *testcontainers.DockerContainer, line string) error {
	switch line {
	case "start":
		return server.Start(ctx)
	case "stop INT":
		timeout := 30 * time.Second
		return server.Stop(ctx, &timeout)
	case "stop QUIT":
		timeout := time.Duration(0)
		return server.Stop(ctx, &timeout)
	default:
		return fmt.Errorf("unknown command %q", line)
	}
}

// answer prints one line.
func answer(err error) {
	if err == nil {
		fmt.Println("ok")
		return
	}
	fmt.Println("error: " + strings.ReplaceAll(err.Error(), "\n", "; "))
}
