import { ErrorNote } from '@/components/ErrorNote';
import { Button, Container, Stack } from '@mantine/core';
import { useTranslation } from 'react-i18next';
import { useRouteError } from 'react-router';

/** A fault of the page itself, or a piece of it that could not be loaded: say so rather than show nothing. */
export function RouteError() {
  const { t } = useTranslation();
  return (
    <Container size="sm" py="xl">
      <Stack align="flex-start">
        <ErrorNote error={useRouteError()} />
        <Button onClick={() => location.reload()}>{t('app.tryAgain')}</Button>
      </Stack>
    </Container>
  );
}
