import { GeneratePage } from '@/features/generate/GeneratePage';
import { SignInPage } from '@/features/session/SignInPage';
import { createBrowserRouter } from 'react-router';
import { NotFound } from './NotFound';
import { RouteError } from './RouteError';
import { Shell } from './Shell';

/** Deep links: everything that a person may want to come back to has an address. */
export const router = createBrowserRouter([
  { path: '/sign-in', element: <SignInPage />, errorElement: <RouteError /> },
  {
    element: <Shell />,
    hydrateFallbackElement: <></>,
    errorElement: <RouteError />,
    children: [
      { index: true, element: <GeneratePage /> },
      {
        path: 'training',
        children: [
          { index: true, lazy: async () => ({ Component: (await import('@/features/training/JobsPage')).JobsPage }) },
          {
            path: 'new',
            lazy: async () => ({ Component: (await import('@/features/training/NewJobPage')).NewJobPage }),
          },
          {
            path: 'models',
            lazy: async () => ({ Component: (await import('@/features/models/ModelsPage')).ModelsPage }),
          },
          { path: ':id', lazy: async () => ({ Component: (await import('@/features/training/JobPage')).JobPage }) },
        ],
      },
      {
        path: 'batches',
        children: [
          {
            index: true,
            lazy: async () => ({ Component: (await import('@/features/batches/BatchesPage')).BatchesPage }),
          },
          {
            path: 'new',
            lazy: async () => ({ Component: (await import('@/features/batches/NewBatchPage')).NewBatchPage }),
          },
          { path: ':id', lazy: async () => ({ Component: (await import('@/features/batches/BatchPage')).BatchPage }) },
        ],
      },
      { path: 'gpus', lazy: async () => ({ Component: (await import('@/features/gpus/GpusPage')).GpusPage }) },
      {
        path: 'gpus/tokens',
        lazy: async () => ({ Component: (await import('@/features/gpus/TokensPage')).TokensPage }),
      },
      { path: 'people', lazy: async () => ({ Component: (await import('@/features/people/PeoplePage')).PeoplePage }) },
      {
        path: 'people/audit',
        lazy: async () => ({ Component: (await import('@/features/people/AuditPage')).AuditPage }),
      },
      {
        path: 'account',
        lazy: async () => ({ Component: (await import('@/features/account/AccountPage')).AccountPage }),
      },
      { path: 'keys', lazy: async () => ({ Component: (await import('@/features/keys/KeysPage')).KeysPage }) },
      { path: '*', element: <NotFound /> },
    ],
  },
]);
