package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgxtenant/pgxtenant"
)

// The routes of the API, which are also the endpoints of limits and metrics.
const (
	routeList   = "GET /projects"
	routeCreate = "POST /projects"
	routeGet    = "GET /projects/{id}"
	routeUpdate = "PUT /projects/{id}"
	routeDelete = "DELETE /projects/{id}"
	routeReport = "GET /report"
)

// Bounds of what a client may send.
const (
	maxBody        = 64 << 10 // bytes
	maxName        = 200      // characters
	maxDescription = 10_000
)

// api answers requests that have a tenant in their contexts.
type api struct {
	projects *projects
}

// routes returns the API. wrap goes around each handler, inside of the mux, where the pattern is known.
func (a *api) routes(wrap func(http.Handler) http.Handler) http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, h func(w http.ResponseWriter, r *http.Request) error) {
		mux.Handle(pattern, wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if err := h(w, r); err != nil {
				refuse(w, r, err)
			}
		})))
	}
	handle(routeList, a.list)
	handle(routeCreate, a.create)
	handle(routeGet, a.get)
	handle(routeUpdate, a.update)
	handle(routeDelete, a.delete)
	handle(routeReport, a.report)
	handle("/projects", notAllowed("GET, HEAD, POST"))
	handle("/projects/{id}", notAllowed("GET, HEAD, PUT, DELETE"))
	handle("/", func(http.ResponseWriter, *http.Request) error { return &badRequest{http.StatusNotFound, ""} })
	return mux
}

func (a *api) list(w http.ResponseWriter, r *http.Request) error {
	var after uuid.UUID // before all others
	if s := r.URL.Query().Get("after"); s != "" {
		var err error
		if after, err = uuid.Parse(s); err != nil {
			return &badRequest{http.StatusBadRequest, "after must be the ID of a project."}
		}
	}
	all, err := a.projects.list(r.Context(), after)
	if err != nil {
		return err
	}
	page := struct {
		Projects []Project  `json:"projects"`
		Next     *uuid.UUID `json:"next,omitempty"` // to be sent as after
	}{Projects: all}
	if len(all) == pageSize {
		page.Next = &all[len(all)-1].ID
	}
	return answer(w, http.StatusOK, page)
}

func (a *api) create(w http.ResponseWriter, r *http.Request) error {
	in, err := readInput(w, r)
	if err != nil {
		return err
	}
	p, err := a.projects.create(r.Context(), in.Name, in.Description)
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/projects/"+p.ID.String())
	return answer(w, http.StatusCreated, p)
}

func (a *api) get(w http.ResponseWriter, r *http.Request) error {
	id, err := idOf(r)
	if err != nil {
		return err
	}
	p, err := a.projects.get(r.Context(), id)
	if err != nil {
		return err
	}
	return answer(w, http.StatusOK, p)
}

func (a *api) update(w http.ResponseWriter, r *http.Request) error {
	id, err := idOf(r)
	if err != nil {
		return err
	}
	in, err := readInput(w, r)
	if err != nil {
		return err
	}
	p, err := a.projects.update(r.Context(), id, in.Name, in.Description)
	if err != nil {
		return err
	}
	return answer(w, http.StatusOK, p)
}

func (a *api) delete(w http.ResponseWriter, r *http.Request) error {
	id, err := idOf(r)
	if err != nil {
		return err
	}
	if err := a.projects.delete(r.Context(), id); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (a *api) report(w http.ResponseWriter, r *http.Request) error {
	report, err := a.projects.report(r.Context())
	if err != nil {
		return err
	}
	return answer(w, http.StatusOK, report)
}

// idOf reads the ID in the path. What cannot be one is nobody's project.
func idOf(r *http.Request) (uuid.UUID, error) {
	id, err := uuid.Parse(r.PathValue("id"))
	if err != nil {
		return id, errNoProject
	}
	return id, nil
}

// input is what a client sends of a project.
type input struct {
	Name        string `json:"name"`
	Description string `json:"description"`
}

func readInput(w http.ResponseWriter, r *http.Request) (in input, err error) {
	if kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || kind != "application/json" {
		return in, &badRequest{http.StatusUnsupportedMediaType, "The body must be application/json."}
	}
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	decoder.DisallowUnknownFields()
	err = decoder.Decode(&in)
	if err == nil {
		if _, more := decoder.Token(); more != io.EOF {
			err = errors.New("more than one value")
		}
	}
	if large := (*http.MaxBytesError)(nil); errors.As(err, &large) {
		return in, &badRequest{http.StatusRequestEntityTooLarge, fmt.Sprintf("The body must have %d bytes at most.", maxBody)}
	}
	if err != nil {
		return in, &badRequest{http.StatusBadRequest, "The body must be one JSON object with name and description."}
	}
	return in, in.validate()
}

func (in input) validate() error {
	switch {
	case strings.TrimSpace(in.Name) == "":
		return &badRequest{http.StatusUnprocessableEntity, "name is missing."}
	case utf8.RuneCountInString(in.Name) > maxName, strings.ContainsFunc(in.Name, unicode.IsControl):
		return &badRequest{http.StatusUnprocessableEntity, fmt.Sprintf("name must have %d characters at most, on one line.", maxName)}
	case utf8.RuneCountInString(in.Description) > maxDescription, strings.ContainsRune(in.Description, 0): // text in PostgreSQL has no NUL
		return &badRequest{http.StatusUnprocessableEntity, fmt.Sprintf("description must have %d characters at most, and no NUL.", maxDescription)}
	}
	return nil
}

// badRequest is what is wrong with a request, to be told to its client.
type badRequest struct {
	status int
	detail string
}

func (e *badRequest) Error() string { return http.StatusText(e.status) + ": " + e.detail }

func notAllowed(methods string) func(http.ResponseWriter, *http.Request) error {
	return func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Allow", methods)
		return &badRequest{http.StatusMethodNotAllowed, ""}
	}
}

// What the server says, by its SQLSTATE.
const (
	codeReadOnly      = "25006" // a write of a tenant with pgxtenant.StatusReadOnly
	codeQueryCanceled = "57014" // by Limits.StatementTimeout
)

// refuse answers with the problem that err is to the client. Of what the library or the database says, pgxtenant.Refuse
// makes a 403, a 503 with Retry-After or a 500, and never shows its text.
func refuse(w http.ResponseWriter, r *http.Request, err error) {
	bad, server := (*badRequest)(nil), (*pgconn.PgError)(nil)
	errors.As(err, &server)
	switch {
	case errors.Is(err, errNoProject):
		bad = &badRequest{http.StatusNotFound, "There is no such project."}
	case errors.As(err, &bad):
	case server != nil && server.Code == codeReadOnly:
		bad = &badRequest{http.StatusForbidden, "This account can be read, and not changed."}
	case server != nil && server.Code == codeQueryCanceled && r.Context().Err() == nil:
		bad = &badRequest{http.StatusServiceUnavailable, "This takes longer than the account's plan allows."}
	default:
		pgxtenant.Refuse(w, r, err)
		return
	}
	p := pgxtenant.Problem{Type: "about:blank", Title: http.StatusText(bad.status), Status: bad.status, Detail: bad.detail, Err: err}
	p.ServeHTTP(w, r)
}

// answer sends value as JSON, which a shared cache in between may not keep: it belongs to one tenant.
func answer(w http.ResponseWriter, status int, value any) error {
	body, err := json.Marshal(value)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "private, no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n'))
	return nil
}
