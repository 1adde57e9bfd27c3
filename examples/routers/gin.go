package main

import (
	"net/http"

	"github.com/gin-gonic/gin"

	"github.com/pgxtenant/pgxtenant"
)

func ginRouter(s *service) http.Handler {
	gin.SetMode(gin.ReleaseMode)
	engine := gin.New()
	engine.Use(gin.Recovery())
	engine.GET("/healthz", func(*gin.Context) {})
	notes := engine.Group("/", ginMiddleware(authenticate), ginMiddleware(s.tenants))
	notes.GET("/notes", func(c *gin.Context) {
		all, err := s.list(c.Request.Context())
		if err != nil {
			pgxtenant.Refuse(c.Writer, c.Request, err)
			return
		}
		c.JSON(http.StatusOK, all)
	})
	notes.POST("/notes", func(c *gin.Context) {
		if err := s.add(c.Request.Context(), c.PostForm("body")); err != nil {
			pgxtenant.Refuse(c.Writer, c.Request, err)
			return
		}
		c.Status(http.StatusCreated)
	})
	return engine
}

// ginMiddleware makes gin's of net/http's. If m does not call the next handler, nor does gin. Handlers must take
// the context of c.Request: gin.Context itself does not have its values, unless Engine.ContextWithFallback is set.
func ginMiddleware(m func(http.Handler) http.Handler) gin.HandlerFunc {
	return func(c *gin.Context) {
		passed := false
		m(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			passed = true
			c.Request = r
			c.Next()
		})).ServeHTTP(c.Writer, c.Request)
		if !passed {
			c.Abort()
		}
	}
}
