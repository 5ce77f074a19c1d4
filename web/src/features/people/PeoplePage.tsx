import { Dialog } from '@/components/Dialog';
import { ErrorNote } from '@/components/ErrorNote';
import { Icon } from '@/components/Icon';
import { Row, Rows } from '@/components/Rows';
import { meQuery } from '@/features/session/queries';
import { ago } from '@/lib/format';
import type { Person } from '@/types/api';
import { Badge, Button, Skeleton } from '@mantine/core';
import { useDisclosure } from '@mantine/hooks';
import { useQuery } from '@tanstack/react-query';
import { useTranslation } from 'react-i18next';
import { AdminPage } from './AdminPage';
import { NewPerson } from './NewPerson';
import { PersonActions } from './PersonActions';
import { peopleQuery } from './queries';

export function PeoplePage() {
  const { t } = useTranslation();
  const people = useQuery(peopleQuery);
  const [creating, modal] = useDisclosure(false);
  return (
    <AdminPage
      title={t('people.title')}
      lead={t('people.lead')}
      actions={
        <Button leftSection={<Icon name="plus" />} onClick={modal.open}>
          {t('people.new')}
        </Button>
      }
    >
      {people.isError ? <ErrorNote error={people.error} retry={() => void people.refetch()} /> : null}
      {people.isPending ? <Skeleton height={90} radius="md" /> : null}
      {people.data ? (
        <Rows label={t('people.title')}>
          {people.data.map((each) => (
            <PersonRow key={each.id} person={each} />
          ))}
        </Rows>
      ) : null}
      <Dialog opened={creating} onClose={modal.close} title={t('people.new')}>
        <NewPerson onDone={modal.close} />
      </Dialog>
    </AdminPage>
  );
}

function PersonRow({ person }: { person: Person }) {
  const { t, i18n } = useTranslation();
  const me = useQuery(meQuery);
  const isAdmin = person.id === me.data?.user.id; // the only one who sees this
  const going = person.deleting_at !== null;
  return (
    <Row
      name={person.name}
      marks={
        going ? (
          <Badge size="sm" color="red" variant="light">
            {t('people.deleting')}
          </Badge>
        ) : person.disabled_at !== null ? (
          <Badge size="sm" color="red" variant="light">
            {t('people.disabled')}
          </Badge>
        ) : isAdmin ? (
          <Badge size="sm" variant="light">
            {t('people.admin')}
          </Badge>
        ) : null
      }
      facts={[
        t('people.created', { when: ago(person.created_at, i18n.language) }),
        t(person.has_password ? 'people.hasPassword' : 'people.noPassword'),
      ]}
    >
      {isAdmin || going ? null : <PersonActions person={person} />}
    </Row>
  );
}
