// The programs of a Kubernetes cluster as one: etcd, the control plane, kubelet, kube-proxy and kubectl.
//
// They share most of their packages, so that one link takes the time and the space of one program instead of seven. Which
// one runs is told by the name it is started under (links beside it), or by the first argument.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	// Metrics and log formats that the components' own mains register.
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/restclient"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	kubectlerrors "k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

// program runs one of them to its end, with os.Args as its own main would see them.
func program(name string) func() {
	switch name {
	case "etcd":
		return func() { etcdmain.Main(os.Args) }
	case "kube-apiserver":
		return component(apiserver.NewAPIServerCommand)
	case "kube-controller-manager":
		return component(controllers.NewControllerManagerCommand)
	case "kube-scheduler":
		return component(func() *cobra.Command { return scheduler.NewSchedulerCommand() })
	case "kube-proxy":
		return component(proxy.NewProxyCommand)
	case "kubelet":
		return component(func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) })
	case "kubectl":
		return func() {
			if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
				kubectlerrors.CheckErr(err) // says what is wrong the way users of kubectl know it, and ends
			}
		}
	}
	return nil
}

var names = []string{"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet", "kubectl"}

func component(command func() *cobra.Command) func() {
	return func() { os.Exit(cli.Run(command())) }
}

func main() {
	if !slices.Contains(names, filepath.Base(os.Args[0])) && len(os.Args) > 1 {
		os.Args = os.Args[1:]
	}
	run := program(filepath.Base(os.Args[0]))
	if run == nil {
		fmt.Fprintf(os.Stderr, "kubebox: start it under one of these names, or with one as first argument: %s\n",
			strings.Join(names, ", "))
		os.Exit(2)
	}
	run()
}
