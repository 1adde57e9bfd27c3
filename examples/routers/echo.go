package main

import (
	"net/http"

	"github.com/labstack/echo/v5"

	"github.com/pgxtenant/pgxtenant"
)

// echoRouter uses the middleware by echo's own adapter.
func echoRouter(s *service) http.Handler {
	e := echo.New()
	e.GET("/healthz", func(c *echo.Context) error { return c.NoContent(http.StatusOK) })
	notes := e.Group("", echo.WrapMiddleware(authenticate), echo.WrapMiddleware(s.tenants))
	notes.GET("/notes", func(c *echo.Context) error {
		all, err := s.list(c.Request().Context())
		if err != nil {
			pgxtenant.Refuse(c.Response(), c.Request(), err)
			return nil
		}
		return c.JSON(http.StatusOK, all)
	})
	notes.POST("/notes", func(c *echo.Context) error {
		if err := s.add(c.Request().Context(), c.FormValue("body")); err != nil {
			pgxtenant.Refuse(c.Response(), c.Request(), err)
			return nil
		}
		return c.NoContent(http.StatusCreated)
	})
	return e
}
